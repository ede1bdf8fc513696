"""What ``plan`` tells of the data: origins of values, buckets, copies, images that fit badly."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from sdxl_train.data.report import dataset_report

if TYPE_CHECKING:
    from pathlib import Path

    from tests.core.data.conftest import MakeImage, MakeScan


def test_each_value_is_the_innermost_and_has_its_origin(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    for name in ("cats", "dogs"):
        make_image(tmp_path / name / "a.png", caption="x")
    config = tmp_path / "data.toml"
    config.write_text(
        """[general]
keep_tokens = 1
caption_prefix = "general"
num_repeats = 2
[[datasets]]
caption_prefix = "dataset"
resolution = [64, 96]
[[datasets.subsets]]
image_dir = "cats"
caption_prefix = "subset"
flip_aug = false
[[datasets.subsets]]
image_dir = "dogs"
""",
        encoding="utf-8",
    )
    found = make_scan(
        dataset_config=config,
        resolution=32,
        flip_aug=True,
        train_batch_size=3,
        caption_separator=";",
    )
    (dataset,) = json.loads(json.dumps(dataset_report(found)))["datasets"]
    cats, dogs = (subset["options"] for subset in dataset["subsets"])

    def of(line: int, key: str) -> str:
        return f"{config}:{line}: {key}"

    expected: list[tuple[dict[str, Any], str, Any, str]] = [
        (dataset["options"], "resolution", [64, 96], of(7, "datasets[0].resolution")),
        (dataset["options"], "batch_size", 3, "--train_batch_size"),
        (dataset["options"], "enable_bucket", False, "default"),
        (cats, "caption_prefix", "subset", of(10, "datasets[0].subsets[0].caption_prefix")),
        (dogs, "caption_prefix", "dataset", of(6, "datasets[0].caption_prefix")),
        (cats, "keep_tokens", 1, of(2, "general.keep_tokens")),
        # Off in the subset is a value too, and wins over the command line.
        (cats, "flip_aug", False, of(11, "datasets[0].subsets[0].flip_aug")),
        (dogs, "flip_aug", True, "--flip_aug"),
        (dogs, "num_repeats", 2, of(4, "general.num_repeats")),
        (dogs, "caption_separator", ";", "--caption_separator"),
        (dogs, "shuffle_caption", False, "default"),
    ]
    for options, name, value, origin in expected:
        assert options[name] == {"value": value, "origin": origin}, name
    assert [s["images"] for s in dataset["subsets"]] == [1, 1]
    assert [s["repeats"] for s in dataset["subsets"]] == [2, 2]


def test_folders_tell_repeats_by_their_names(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    make_image(tmp_path / "train" / "3_cat" / "a.png")
    make_image(tmp_path / "reg" / "1_cat" / "b.png")
    found = make_scan(train_data_dir=tmp_path / "train", reg_data_dir=tmp_path / "reg")
    (dataset,) = dataset_report(found)["datasets"]
    options, of_reg = (subset["options"] for subset in dataset["subsets"])
    assert options["is_reg"] == {"value": False, "origin": "default"}
    assert of_reg["is_reg"] == {"value": True, "origin": "--reg_data_dir"}
    origin = "the name of folder 3_cat"
    assert options["num_repeats"] == {"value": 3, "origin": origin}
    assert options["class_tokens"] == {"value": "cat", "origin": origin}


def test_copies_are_named_whatever_their_folder(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    first = make_image(tmp_path / "1_a" / "first.png", caption="x")
    copy = tmp_path / "1_b" / "copy.png"
    copy.parent.mkdir()
    shutil.copyfile(first, copy)
    # The same length, another content.
    other = bytearray(first.read_bytes())
    other[-20] ^= 255
    (tmp_path / "1_b" / "other.png").write_bytes(other)
    found = make_scan(train_data_dir=tmp_path)
    assert dataset_report(found)["duplicates"] == [[str(first), str(copy)]]
    assert f"1 image is a copy of another, with the same content: {first} = {copy}" in (
        "\n".join(found.warnings)
    )


def test_of_many_copies_a_few_are_named(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    first = make_image(tmp_path / "1_a" / "0.png", caption="x")
    for number in range(1, 8):
        shutil.copyfile(first, first.with_name(f"{number}.png"))
    found = make_scan(train_data_dir=tmp_path)
    (group,) = dataset_report(found)["duplicates"]
    assert len(group) == 8
    named = " = ".join(str(first.with_name(f"{number}.png")) for number in range(5))
    assert f"7 images are copies of another, with the same content: {named} and 3 more" in (
        found.warnings
    )


def test_one_file_in_two_datasets_is_no_copy(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    make_image(tmp_path / "cats" / "a.png", caption="x")
    config = tmp_path / "data.toml"
    config.write_text(
        """[[datasets]]
resolution = 64
[[datasets.subsets]]
image_dir = "cats"
[[datasets]]
resolution = 128
[[datasets.subsets]]
image_dir = "cats"
""",
        encoding="utf-8",
    )
    report = dataset_report(make_scan(dataset_config=config))
    assert report["duplicates"] == []
    assert [d["images"] for d in report["datasets"]] == [1, 1]
    assert [b["resolution"] for b in report["buckets"]] == [[64, 64], [128, 128]]


def test_small_and_narrow_images_are_named_with_what_becomes_of_them(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    make_image(tmp_path / "1_a" / "good.png", (64, 64), caption="x")
    make_image(tmp_path / "1_a" / "small.png", (16, 16), caption="x")
    make_image(tmp_path / "1_a" / "narrow.png", (64, 1280), caption="x")
    found = make_scan(train_data_dir=tmp_path)
    report = dataset_report(found)
    small, narrow = str(tmp_path / "1_a" / "small.png"), str(tmp_path / "1_a" / "narrow.png")
    assert report["tiny"] == [{"path": small, "size": [16, 16], "bucket": [64, 64], "scale": 4.0}]
    # 64x1280 is cut to its middle 64x64.
    assert report["extreme"] == [
        {"path": narrow, "size": [64, 1280], "bucket": [64, 64], "crop_share": 0.95}
    ]
    (bucket,) = report["buckets"]
    assert bucket["crop_share"] == round(0.95 / 3, 4)
    assert bucket["upscale_share"] == round(1 / 3, 4)
    told = "\n".join(found.warnings)
    assert f"enlarged to more than twice its size: {small} (4.0 times)" in told
    assert f"cut off: {narrow} (64x1280, 95% cut off)" in told


def test_masks_are_counted(tmp_path: Path, make_image: MakeImage, make_scan: MakeScan) -> None:
    for name in ("a.png", "b.png"):
        make_image(tmp_path / "1_a" / name, caption="x")
        make_image(tmp_path / "masks" / name)
    masks = tmp_path / "masks"
    found = make_scan(train_data_dir=tmp_path, conditioning_data_dir=masks, masked_loss=True)
    report = dataset_report(found)
    assert report["masks"] == 2
    assert report["datasets"][0]["subsets"][0]["masks"] == 2


def test_what_is_wrong_with_a_folder_of_two_datasets_is_told_once(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    make_image(tmp_path / "cats" / "a.png")
    (tmp_path / "cats" / "b.png").write_bytes(b"")
    config = tmp_path / "data.toml"
    subset = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "cats"\n'
    config.write_text(subset + subset, encoding="utf-8")
    found = make_scan(dataset_config=config)
    assert len(found.problems) == 1


def test_a_held_out_image_with_a_copy_in_training_is_told(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    for number in range(4):
        make_image(tmp_path / "1_a" / f"{number}.png", caption="x")
        shutil.copyfile(tmp_path / "1_a" / f"{number}.png", tmp_path / "1_a" / f"{number}b.png")
    found = make_scan(train_data_dir=tmp_path, validation_split=0.125)
    (held,) = (image.path for dataset in found.validation for image in dataset.images)
    (told,) = [text for text in found.warnings if "held out to validate on" in text]
    assert told.startswith(f"{held} is held out to validate on, but ")
    copy = held.with_name(
        held.name.replace("b.png", ".png") if "b" in held.stem else f"{held.stem}b.png"
    )
    assert str(copy) in told
