"""The scan: what is used, what is left out and why, and what stops a run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from sdxl_train.data.batches import BatchPlan
from sdxl_train.data.dataset_config import DatasetOptions, resolve_datasets
from sdxl_train.data.images import load_image
from sdxl_train.data.report import dataset_report
from sdxl_train.data.sources import Scan, scan

if TYPE_CHECKING:
    from tests.core.data.conftest import MakeImage, MakeScan


def problems(found: Scan) -> list[str]:
    return [str(problem) for problem in found.problems]


def test_summary_counts_what_will_be_trained(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    make_image(tmp_path / "train" / "3_cat" / "a.png", (64, 64), caption="one")
    make_image(tmp_path / "train" / "3_cat" / "b.jpg", (128, 64))
    make_image(tmp_path / "train" / "1_dog" / "c.webp", (64, 128), caption="two")
    make_image(tmp_path / "reg" / "1_cat" / "r.png", (64, 64))
    (tmp_path / "train" / "3_cat" / "notes.gif").write_bytes(b"GIF89a")
    found = make_scan(
        train_data_dir=tmp_path / "train",
        reg_data_dir=tmp_path / "reg",
        enable_bucket=True,
        min_bucket_reso=32,
        max_bucket_reso=128,
        bucket_reso_steps=8,
    )
    assert problems(found) == []
    report = dataset_report(found)
    expected = {
        "images": 3,
        "repeats": 7,
        "regularization": 1,
        "validation": 0,
        "with_caption": 2,
        "skipped": [
            {
                "path": str(tmp_path / "train" / "3_cat" / "notes.gif"),
                "reason": "image type .gif is not supported",
            }
        ],
    }
    assert {name: report[name] for name in expected} == expected
    # 128x64 covers 88x40 at 88x44, which is cut to 40: 1 in 11 goes. Nothing is enlarged.
    wide = {"images": 1, "crop_share": 0.0909, "upscale_share": 0.0}
    square = {"images": 2, "crop_share": 0.0, "upscale_share": 0.0}
    assert report["buckets"] == [
        {"resolution": [40, 88], "repeats": 1, **wide},
        # Regularization images have as many samples as there are to train.
        {"resolution": [64, 64], "repeats": 3 + 7, **square},
        {"resolution": [88, 40], "repeats": 3, **wide},
    ]


def test_images_come_sorted_with_their_captions(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    for name in ("b.png", "a.png", "c.png"):
        make_image(tmp_path / "2_cat girl" / name, caption=f"caption {name}")
    (tmp_path / "2_cat girl" / "c.txt").unlink()
    (tmp_path / "2_cat girl" / "b.caption").write_text("preferred", encoding="utf-8")
    found = make_scan(train_data_dir=tmp_path)
    images = found.datasets[0].images
    assert [image.key for image in images] == [
        "2_cat girl/a.png",
        "2_cat girl/b.png",
        "2_cat girl/c.png",
    ]
    assert [image.caption for image in images] == ["caption a.png", "preferred", "cat girl"]
    assert [image.has_caption for image in images] == [True, True, False]
    assert "1 of 3 images have no caption file" in "\n".join(found.warnings)
    assert "'cat girl'" in "\n".join(found.warnings)


def test_odd_names_work(tmp_path: Path, make_image: MakeImage, make_scan: MakeScan) -> None:
    names = ["a.b.c", "猫 🐈", "-dash", "x" * 240, "#1 100%", "[a]{b}"]
    for name in names:
        path = make_image(tmp_path / "1_cat" / f"{name}.png")
        path.with_name(f"{name}.txt").write_text(name, encoding="utf-8")
    found = make_scan(train_data_dir=tmp_path)
    assert problems(found) == []
    assert sorted(image.caption for image in found.datasets[0].images) == sorted(names)


def test_what_is_left_out_is_listed_by_reason(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    folder = tmp_path / "1_cat"
    make_image(folder / "a.Jpg", caption="a")
    make_image(folder / "nested" / "deep.png")
    for name in ("._a.png", "Thumbs.db", "b.tiff", "orphan.txt", "a.caption.bak"):
        (folder / name).write_bytes(b"x")
    found = make_scan(train_data_dir=tmp_path)
    assert [image.path.name for image in found.datasets[0].images] == ["a.Jpg"]
    assert {entry.path.name: entry.reason for entry in found.skipped} == {
        "._a.png": "hidden",
        "Thumbs.db": "not an image",
        "b.tiff": "image type .tiff is not supported",
        "orphan.txt": "caption without an image",
        "a.caption.bak": "not an image",
        "nested": "folder; only files directly in the image folder count",
    }
    assert any("image type .tiff is not supported, left out" in line for line in found.warnings)


def test_every_bad_image_is_a_problem_with_its_path(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    folder = tmp_path / "1_cat"
    make_image(folder / "good.png")
    make_image(folder / "dot.png", (1, 1))
    make_image(folder / "thin.png", (400, 7))
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "page.png").write_bytes(b"<html>404</html>")
    whole = make_image(folder / "cut.png", (64, 64)).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    found = make_scan(train_data_dir=tmp_path)
    told = {Path(problem.place).name: problem.message for problem in found.problems}
    assert set(told) == {
        "dot.png", "thin.png", "zero.jpg", "page.png", "cut.png", "gone.png", "loop.png",
    }  # fmt: skip
    assert told["dot.png"] == "1x1 is less than 8 pixels on a side"
    assert "is empty" in told["zero.jpg"]
    assert "<html>404" in told["page.png"]
    assert "cannot be read" in told["gone.png"]
    assert all(problem.place.startswith(str(folder)) for problem in found.problems)


def test_images_too_small_for_no_upscale_are_problems(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    make_image(tmp_path / "1_cat" / "a.png", (40, 200))
    found = make_scan(
        train_data_dir=tmp_path, resolution=128, enable_bucket=True, bucket_no_upscale=True
    )
    assert "40x200 is too small" in problems(found)[0]


def test_captions_under_another_ending_are_not_overlooked(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    for name in ("a", "b"):
        make_image(tmp_path / "1_cat" / f"{name}.png")
        (tmp_path / "1_cat" / f"{name}.tags").write_text("x", encoding="utf-8")
    (problem,) = problems(make_scan(train_data_dir=tmp_path))
    assert problem.startswith("--caption_extension: no image in")
    assert problem.endswith("use --caption_extension .tags")
    assert problems(make_scan(train_data_dir=tmp_path, caption_extension="tags")) == []


def test_the_old_spelling_of_the_caption_extension_is_understood(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    image = make_image(tmp_path / "1_cat" / "a.png", caption="not this")
    image.with_suffix(".tags").write_text("this", encoding="utf-8")
    found = make_scan(train_data_dir=tmp_path, caption_extention="tags")
    assert [record.caption for record in found.datasets[0].images] == ["this"]


def test_lines_of_a_caption_are_kept_for_wildcards_only(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    make_image(tmp_path / "1_cat" / "a.png", caption="one\n\n two \n")
    found = make_scan(train_data_dir=tmp_path)
    assert found.datasets[0].images[0].caption == "one"
    assert "only the first is used (enable_wildcard)" in " ".join(found.warnings)
    found = make_scan(train_data_dir=tmp_path, enable_wildcard=True)
    assert found.datasets[0].images[0].caption == "one\ntwo"
    assert "only the first" not in " ".join(found.warnings)


def test_an_unbalanced_wildcard_is_a_problem_with_its_column(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    image = make_image(tmp_path / "1_cat" / "a.png", caption="one\na {b|c")
    (problem,) = problems(make_scan(train_data_dir=tmp_path, enable_wildcard=True))
    assert problem.startswith(f"{image.with_suffix('.txt')}:2:3: a brace that is no part")
    assert problems(make_scan(train_data_dir=tmp_path)) == []


def test_wildcards_follow_from_seed_epoch_and_sample(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    make_image(tmp_path / "9_cat" / "a.png", caption="{a|b|c}\n{d|e}")
    found = make_scan(train_data_dir=tmp_path, enable_wildcard=True)

    def captions(seed: int, epoch: int) -> list[str]:
        plan = BatchPlan(found.datasets, seed)
        drawn = [(s.samples[0].repeat, plan.captions(s)[0]) for s in plan.epoch(epoch)]
        return [caption for _, caption in sorted(drawn)]

    assert captions(1, 1) == captions(1, 1)
    assert len({tuple(captions(*key)) for key in ((1, 1), (1, 2), (2, 1))}) == 3
    assert set(captions(1, 1)) | set(captions(1, 2)) | set(captions(2, 1)) == set("abcde")


def test_txt_captions_are_a_problem_when_caption_is_asked_for(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    make_image(tmp_path / "1_cat" / "a.png", caption="x")
    (problem,) = problems(make_scan(train_data_dir=tmp_path, caption_extension=".caption"))
    assert problem.endswith("use --caption_extension .txt")


def test_remarks_on_files_are_gathered(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    folder = tmp_path / "1_cat"
    for number in range(7):
        make_image(folder / f"{number}.png", caption="one\ntwo")
    make_image(folder / "0.jpg")
    make_image(folder / "big.webp").rename(folder / "big.png")
    make_image(folder / "tiny.png", (16, 16))
    (folder / "tiny.txt").write_bytes(b"caf\xe9")
    (folder / "big.txt").write_bytes(b"")
    found = make_scan(train_data_dir=tmp_path)
    text = "\n".join(found.warnings)
    many = "7 files: caption more than one line, only the first is used (enable_wildcard): "
    assert many in text
    assert " and 2 more" in text
    assert f"1 file: caption not UTF-8, read as cp1252: {folder / 'tiny.txt'}" in text
    assert "1 file: caption empty" in text
    assert "the same name as another image, and so the same caption" in text
    assert f"1 file: in truth WEBP, read as that: {folder / 'big.png'}" in text
    assert f"1 file: enlarged to more than twice its size: {folder / 'tiny.png'}" in text
    assert problems(found) == []


def test_a_caption_that_is_no_text_is_a_problem(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    make_image(tmp_path / "1_cat" / "a.png")
    (tmp_path / "1_cat" / "a.txt").write_bytes(b"\x81\xff\x8d\xff\x90\xff\xff")
    (problem,) = make_scan(train_data_dir=tmp_path).problems
    assert problem.place == str(tmp_path / "1_cat" / "a.txt")


def test_folders_without_images_are_told_with_their_content(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    make_image(tmp_path / "1_cat" / "inner" / "a.png")
    (tmp_path / "1_cat" / "a.gif").write_bytes(b"GIF89a")
    (problem,) = problems(make_scan(train_data_dir=tmp_path))
    assert "1_cat holds no images (1 x image type .gif is not supported; 1 x folder" in problem
    assert problem.endswith(f"images lie one level deeper: name {tmp_path / '1_cat' / 'inner'}")


def test_wrong_bucket_options_are_told_beside_bad_images(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    make_image(tmp_path / "1_cat" / "a.png")
    (tmp_path / "1_cat" / "b.png").write_bytes(b"")
    found = make_scan(multiple=32, train_data_dir=tmp_path, resolution=100)
    places = [problem.place for problem in found.problems]
    assert places == ["--resolution", str(tmp_path / "1_cat" / "b.png")]
    assert found.datasets[0].images == ()


def test_the_same_folder_twice_counts_once(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "cats" / "a.png")
    path = tmp_path / "data.toml"
    subset = f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'cats'}'\n"
    path.write_text(f"[[datasets]]\n{subset * 2}[[datasets]]\n{subset}", encoding="utf-8")
    options = DatasetOptions(dataset_config=path, resolution=(64, 64))
    configs, _, _ = resolve_datasets(options, lambda name: name)
    found = scan(configs, bucket_multiple=8, place=lambda name: name)
    assert [len(dataset.images) for dataset in found.datasets] == [1, 1]
    assert "is named twice in this dataset" in "\n".join(found.warnings)


def test_the_scan_goes_on_beside_a_folder_that_is_missing(
    tmp_path: Path, make_image: MakeImage
) -> None:
    make_image(tmp_path / "cats" / "a.png", (1, 1))
    path = tmp_path / "data.toml"
    subsets = [f"[[datasets.subsets]]\nimage_dir = '{tmp_path / n}'\n" for n in ("cats", "dogs")]
    path.write_text("[[datasets]]\n" + "".join(subsets), encoding="utf-8")
    options = DatasetOptions(dataset_config=path, resolution=(64, 64))
    configs, missing, _ = resolve_datasets(options, lambda name: name)
    found = scan(configs, bucket_multiple=8, place=lambda name: name)
    assert [problem.message for problem in missing] == [f"{tmp_path / 'dogs'} does not exist"]
    assert [Path(problem.place).name for problem in found.problems] == ["a.png"]


def test_regularization_subsets_alone_are_a_problem(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "cats" / "a.png")
    path = tmp_path / "data.toml"
    text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'cats'}'\nis_reg = true\n"
    path.write_text(text, encoding="utf-8")
    options = DatasetOptions(dataset_config=path, resolution=(64, 64))
    configs, _, _ = resolve_datasets(options, lambda name: name)
    (problem,) = scan(configs, bucket_multiple=8, place=lambda name: name).problems
    assert "nothing to train" in problem.message


@pytest.mark.parametrize(
    ("reg_images", "reg_repeats", "expected"),
    [
        # The rule of sd-scripts: own repeats first, then one more each until they match.
        (1, 1, [6]),
        (4, 1, [2, 2, 1, 1]),
        (2, 2, [3, 3]),
        (9, 1, [1, 1, 1, 1, 1, 1]),
        (3, 4, [4, 4]),
    ],
)
def test_regularization_images_match_the_training_samples(
    tmp_path: Path,
    make_image: MakeImage,
    make_scan: MakeScan,
    reg_images: int,
    reg_repeats: int,
    expected: list[int],
) -> None:
    for number in range(2):
        make_image(tmp_path / "train" / "3_cat" / f"{number}.png")
    for number in range(reg_images):
        make_image(tmp_path / "reg" / f"{reg_repeats}_cat" / f"{number}.png")
    found = make_scan(train_data_dir=tmp_path / "train", reg_data_dir=tmp_path / "reg")
    repeats = [image.repeats for image in found.datasets[0].images if image.is_reg]
    assert repeats == expected
    unused = reg_images - len(expected)
    said = any(f"{unused} of {reg_images} regularization images" in w for w in found.warnings)
    assert said == (unused > 0)


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_of_a_film_the_first_picture_is_used_and_told(
    tmp_path: Path, make_scan: MakeScan, name: str
) -> None:
    path = tmp_path / "1_cat" / name
    path.parent.mkdir()
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    red.save(path, save_all=True, append_images=[blue], lossless=True)
    found = make_scan(train_data_dir=tmp_path)
    assert f"1 file: animated, only its first picture is used: {path}" in found.warnings
    assert load_image(path).getpixel((32, 32)) == (255, 0, 0)


def test_of_thousands_of_folders_some_are_remarked_on(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    for number in range(25):
        make_image(tmp_path / f"1_{number:02}" / "a.png", (64, 64 + number))
    lines = [line for line in make_scan(train_data_dir=tmp_path).warnings if "caption" in line]
    assert lines[19].startswith(f"{tmp_path / '1_19'}: 1 of 1 images have no caption file")
    assert lines[20:] == ["5 more folders have captions to be remarked on"]


def test_an_unreadable_folder_is_a_problem(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image(tmp_path / "1_cat" / "a.png")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sdxl_train.data.subset_scan.list_folder", refuse)
    (problem,) = problems(make_scan(train_data_dir=tmp_path))
    assert "cannot be read: Permission denied" in problem


def test_two_thousand_images_are_scanned_quickly(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    first = make_image(tmp_path / "1_cat" / "0000.jpg", (96, 64), caption="a, b")
    for number in range(1, 2000):
        os.link(first, first.with_name(f"{number:04}.jpg"))
        os.link(first.with_suffix(".txt"), first.with_name(f"{number:04}.txt"))
    start = time.perf_counter()
    found = make_scan(train_data_dir=tmp_path)
    # About 0.6 s on two slow cores; the bound leaves room for a busy machine.
    assert time.perf_counter() - start < 15
    assert dataset_report(found)["with_caption"] == 2000
