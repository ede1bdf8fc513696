"""Metadata files: which image gets which caption, and every mistake in an entry with its place."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from sdxl_train.data.dataset_config import DatasetOptions, resolve_datasets
from sdxl_train.data.report import dataset_report
from sdxl_train.data.sources import Scan, scan

if TYPE_CHECKING:
    from pathlib import Path

    from tests.core.data.conftest import MakeImage


def flag(name: str) -> str:
    return f"--{name}"


@pytest.fixture
def images(tmp_path: Path, make_image: MakeImage) -> Path:
    for name in ("a.png", "b.jpg", "c.d.png"):
        make_image(tmp_path / "images" / name)
    return tmp_path / "images"


def scanned(**options: Any) -> Scan:
    configs, problems, _ = resolve_datasets(DatasetOptions(**{"resolution": 64} | options), flag)
    assert problems == []
    return scan(configs, bucket_multiple=8, place=flag, skip_bad=options.get("skip", False))


def write(path: Path, entries: Any) -> Path:
    if path.suffix == ".jsonl":
        lines = (
            entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
            for entry in entries
        )
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        path.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    return path


def captions(found: Scan) -> dict[str, str]:
    assert found.problems == ()
    return {image.path.name: image.caption for image in found.datasets[0].images}


def problems(found: Scan) -> list[str]:
    return [str(problem) for problem in found.problems]


def test_caption_and_tags_are_joined_by_the_separator(tmp_path: Path, images: Path) -> None:
    file = write(
        tmp_path / "meta.json",
        {
            "a.png": {"caption": "a cat", "tags": "tabby, grey"},
            "b.jpg": {"tags": "only tags"},
            "c.d.png": {"caption": "only words", "image_size": [64, 64]},
        },
    )
    found = scanned(in_json=file, train_data_dir=images)
    # sd-scripts adds no space: reference 2.7.
    assert captions(found) == {
        "a.png": "a cat,tabby, grey",
        "b.jpg": "only tags",
        "c.d.png": "only words",
    }
    assert found.warnings == ()
    assert dataset_report(found)["with_caption"] == 3


def test_json_lines_say_the_same(tmp_path: Path, images: Path) -> None:
    file = write(
        tmp_path / "meta.jsonl",
        [
            {"image_path": "a.png", "caption": "čat"},
            "",
            {"image_path": str(images / "b.jpg"), "tags": "x"},
        ],
    )
    found = scanned(in_json=file, train_data_dir=images)
    assert captions(found) == {"a.png": "čat", "b.jpg": "x"}
    assert [(s.path.name, s.reason) for s in found.skipped] == [
        ("c.d.png", "an image that the metadata file does not name")
    ]


def test_images_are_found_whole_beneath_the_folder_or_without_ending(
    tmp_path: Path, images: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image(images / "deep" / "e.png")
    monkeypatch.chdir(tmp_path)
    keys = [str(images / "a.png"), "images/b.jpg", "c.d", "deep/e"]
    file = write(tmp_path / "meta.json", {key: {"caption": key} for key in keys})
    assert captions(scanned(in_json=file, train_data_dir=images)) == dict(
        zip(("a.png", "b.jpg", "c.d.png", "e.png"), keys, strict=True)
    )


def test_whole_paths_need_no_folder(tmp_path: Path, images: Path) -> None:
    file = write(tmp_path / "meta.json", {str(images / "a.png"): {"caption": "x"}})
    assert captions(scanned(in_json=file)) == {"a.png": "x"}


def test_names_without_a_folder_are_refused(tmp_path: Path, images: Path) -> None:
    found = scanned(in_json=write(tmp_path / "meta.json", {"a.png": {"caption": "x"}}))
    assert "a.png: is not a whole path" in problems(found)[0]
    assert "set image_dir" in problems(found)[0]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_each_bad_entry_is_told_with_its_line(tmp_path: Path, images: Path, suffix: str) -> None:
    bad: dict[str, Any] = {
        "a.png": {"caption": 3},
        "b.jpg": {"caption": "x", "tags": ["y"]},
        "c.d.png": {"caption": "x", "image_size": [0, "4"]},
        "gone.png": {"caption": "x"},
    }
    entries = (
        bad if suffix == ".json" else [{"image_path": key} | bad[key] for key in bad] + ["[1]"]
    )
    file = write(tmp_path / f"meta{suffix}", entries)
    lines = file.read_text(encoding="utf-8").split("\n")
    told = problems(scanned(in_json=file, train_data_dir=images))
    for key, text in {
        "a.png": "caption is 3, expected text",
        "b.jpg": "tags is ['y'], expected text",
        "c.d.png": "expected [width, height] in pixels",
    }.items():
        number = next(n for n, line in enumerate(lines, 1) if f'"{key}"' in line)
        (problem,) = [line for line in told if f": {key}: " in line]
        assert problem.startswith(f"{file}:{number}: ")
        assert text in problem
    assert any("gone.png: there is no such image" in problem for problem in told)
    assert len(told) == (4 if suffix == ".json" else 5)


def test_all_syntax_mistakes_of_json_lines_are_told(tmp_path: Path, images: Path) -> None:
    file = write(tmp_path / "meta.jsonl", ["{", '{"image_path": "a.png"}', "{'a': 1}"])
    told = problems(scanned(in_json=file, train_data_dir=images))
    assert [line.split(": ")[0] for line in told] == [f"{file}:1:2", f"{file}:3:2"]


def test_the_key_of_another_program_is_named(tmp_path: Path, images: Path) -> None:
    file = write(tmp_path / "meta.jsonl", ['{"file_name": "a.png", "caption": "a cat"}'])
    (told,) = problems(scanned(in_json=file, train_data_dir=images))
    assert told == f"{file}:1: has no image_path: file_name is called so here"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", "is not an object of images"),
        ("{}", "names no images"),
        ('{"a.png": {}, "a.png": {}}', "key a.png occurs twice"),
        ('{"a.png": {"caption": "x"},}', "meta.json:1:"),
        ("\ufeff{", "meta.json:1:"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_told(
    tmp_path: Path, images: Path, text: str, expected: str
) -> None:
    file = tmp_path / "meta.json"
    file.write_text(text, encoding="utf-8")
    assert expected in problems(scanned(in_json=file, train_data_dir=images))[0]


def test_an_image_named_twice_is_told(tmp_path: Path, images: Path) -> None:
    entries = {"a.png": {"caption": "x"}, "a": {"caption": "y"}}
    file = write(tmp_path / "meta.json", entries)
    (told,) = problems(scanned(in_json=file, train_data_dir=images))
    assert "again, after" in told


def test_a_wrong_folder_is_one_problem(tmp_path: Path, images: Path) -> None:
    file = write(tmp_path / "meta.json", {f"{n}.png": {"caption": "x"} for n in range(500)})
    (told,) = problems(scanned(in_json=file, train_data_dir=images))
    assert "none of its 500 images is there" in told


def test_missing_images_are_left_out_where_that_is_asked_for(tmp_path: Path, images: Path) -> None:
    file = write(tmp_path / "meta.json", {"a.png": {"caption": "x"}, "gone.png": {}})
    configs, _, _ = resolve_datasets(
        DatasetOptions(resolution=64, in_json=file, train_data_dir=images), flag
    )
    found = scan(configs, bucket_multiple=8, place=flag, skip_bad=True)
    assert captions(found) == {"a.png": "x"}
    assert (images / "gone.png", "there is no such image") in [
        (s.path, s.reason) for s in found.skipped
    ]


def test_what_an_entry_tells_in_vain_is_told(tmp_path: Path, images: Path) -> None:
    entry = {"caption": "one\ntwo", "image_size": [32, 64], "train_resolution": [64, 64]}
    file = write(tmp_path / "meta.json", {"a.png": entry, "b.jpg": {}})
    told = "\n".join(scanned(in_json=file, train_data_dir=images).warnings)
    assert "its field train_resolution is not used" in told
    assert "image_size in the metadata file is not that of the image" in told
    assert "only the first is used (enable_wildcard)" in told
    assert "1 of 2 images have no caption" in told


def test_with_wildcards_each_line_has_the_tags(tmp_path: Path, images: Path) -> None:
    entries = {
        "a.png": {"caption": "one\n\n two ", "tags": "x\ny"},
        "b.jpg": {"caption": "", "tags": "{red|blue"},
    }
    file = write(tmp_path / "meta.json", entries)
    found = scanned(in_json=file, train_data_dir=images, enable_wildcard=True)
    # sd-scripts loses the tags of an empty caption (reference 14.1-12); here they are the caption.
    assert [image.caption for image in found.datasets[0].images] == [
        "one,x,y\ntwo,x,y",
        "{red|blue",
    ]
    (told,) = problems(found)
    assert "b.jpg: caption:1:1: a brace that is no part of a wildcard" in told


def test_a_dataset_file_mixes_no_styles_and_refuses_idle_keys(tmp_path: Path, images: Path) -> None:
    meta = write(tmp_path / "meta.json", {"a.png": {"caption": "x"}})
    config = tmp_path / "data.toml"
    config.write_text(
        f"""[general]
caption_extension = ".txt"
[[datasets]]
[[datasets.subsets]]
image_dir = '{images}'
metadata_file = '{meta}'
class_tokens = "cat"
is_reg = false
[[datasets.subsets]]
image_dir = '{images}'
[[datasets]]
[[datasets.subsets]]
metadata_file = '{tmp_path / "gone.json"}'
[[datasets]]
[[datasets.subsets]]
num_repeats = 3
""",
        encoding="utf-8",
    )
    _, found, _ = resolve_datasets(DatasetOptions(resolution=64, dataset_config=config), flag)
    assert ["image_dir: is required" in str(problem) for problem in found] == [True]
    text = config.read_text(encoding="utf-8")
    config.write_text(text[: text.rindex("[[datasets]]")], encoding="utf-8")
    _, found, _ = resolve_datasets(DatasetOptions(resolution=64, dataset_config=config), flag)
    told = "\n".join(map(str, found))
    assert f"{config}:7: datasets[0].subsets[0].class_tokens: does not go with" in told
    assert f"{config}:8: datasets[0].subsets[0].is_reg: does not go with" in told
    assert "put them into [[datasets]] of their own" in told
    assert "gone.json does not exist" in told
    assert "caption_extension" not in told


def test_regularization_images_have_no_place_beside_a_metadata_file(
    tmp_path: Path, images: Path
) -> None:
    meta = write(tmp_path / "meta.json", {"a.png": {"caption": "x"}})
    options = DatasetOptions(
        resolution=64, in_json=meta, train_data_dir=images, reg_data_dir=images
    )
    _, found, _ = resolve_datasets(options, flag)
    assert [problem.place for problem in found] == ["--reg_data_dir"]
    both = DatasetOptions(resolution=64, in_json=meta, dataset_config=tmp_path / "x.toml")
    _, found, _ = resolve_datasets(both, flag)
    assert "given together with --in_json" in str(found[0])


def test_images_of_several_folders_find_their_masks(
    tmp_path: Path, images: Path, make_image: MakeImage
) -> None:
    make_image(images / "deep" / "e.png")
    for name in ("a.png", "b.png", "e.png", "other.png"):
        make_image(tmp_path / "masks" / name)
    file = write(tmp_path / "meta.json", {"deep/e": {}, "a": {}, "b": {"tags": "x"}})
    found = scanned(
        in_json=file,
        train_data_dir=images,
        masked_loss=True,
        conditioning_data_dir=tmp_path / "masks",
    )
    assert found.problems == ()
    pairs = {i.path.name: i.mask.name for i in found.datasets[0].images if i.mask}
    assert pairs == {"a.png": "a.png", "b.jpg": "b.png", "e.png": "e.png"}
    assert dataset_report(found)["masks"] == 3
    assert (tmp_path / "masks" / "other.png", "mask without an image") in [
        (skipped.path, skipped.reason) for skipped in found.skipped
    ]


def test_a_metadata_file_needs_its_ending(tmp_path: Path, images: Path) -> None:
    file = tmp_path / "meta.txt"
    file.write_text("{}", encoding="utf-8")
    options = DatasetOptions(resolution=64, in_json=file, train_data_dir=images)
    _, (problem,), _ = resolve_datasets(options, flag)
    assert str(problem).startswith("--in_json: ")
    assert "is neither .json nor .jsonl" in str(problem)
