"""The metadata of the data, in the shapes that sd-scripts writes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from sdxl_train.data.dataset_config import DatasetOptions
from sdxl_train.data.metadata import dataset_metadata

if TYPE_CHECKING:
    from pathlib import Path

    from tests.core.data.conftest import MakeImage, MakeScan, ReadGolden

OPTIONS: dict[str, Any] = {
    "resolution": (64, 64),
    "enable_bucket": True,
    "min_bucket_reso": 32,
    "max_bucket_reso": 128,
    "bucket_reso_steps": 8,
    "train_batch_size": 2,
}


@pytest.fixture
def folder(tmp_path: Path, make_image: MakeImage) -> Path:
    make_image(tmp_path / "train" / "3_cat" / "a.png", (64, 64), caption="Cat, tabby,")
    make_image(tmp_path / "train" / "3_cat" / "b.png", (128, 64), caption="cat,dog")
    make_image(tmp_path / "reg" / "1_animal" / "r.png", (64, 64))
    return tmp_path


def test_a_folder_run_has_the_keys_and_shapes_of_the_golden_file(
    folder: Path, make_scan: MakeScan, golden: ReadGolden
) -> None:
    options = OPTIONS | {"train_data_dir": folder / "train", "reg_data_dir": folder / "reg"}
    found = dataset_metadata(make_scan(**options), DatasetOptions(**options))
    theirs = golden("metadata")["t_bf16.safetensors"]["metadata"]
    assert set(found) <= set(theirs)
    for key, value in found.items():
        if theirs[key].startswith("{"):
            assert type(json.loads(value)) is type(json.loads(theirs[key])), key
    assert found["ss_resolution"] == "(64, 64)"
    assert found["ss_enable_bucket"] == "True"
    assert found["ss_num_train_images"] == "6"
    assert found["ss_num_reg_images"] == "6"
    # Square: 3 + 6 samples in 5 batches of 2; wide: 3 samples in 2.
    assert json.loads(found["ss_dataset_dirs"]) == {"3_cat": {"n_repeats": 3, "img_count": 2}}
    assert json.loads(found["ss_reg_dataset_dirs"]) == {
        "1_animal": {"n_repeats": 1, "img_count": 1}
    }
    assert json.loads(found["ss_tag_frequency"]) == {
        "3_cat": {"cat": 2, "tabby": 1, "dog": 1},
        "1_animal": {"animal": 1},
    }
    # The wide image, 2:1, is trained at 88x40, 2.2:1.
    assert json.loads(found["ss_bucket_info"]) == {
        "buckets": {
            "0": {"resolution": [64, 64], "count": 9},
            "1": {"resolution": [88, 40], "count": 3},
        },
        "mean_img_ar_error": pytest.approx(0.2 / 3),
    }


def test_a_dataset_file_lists_its_datasets(
    folder: Path, make_scan: MakeScan, tmp_path: Path
) -> None:
    config = tmp_path / "data.toml"
    config.write_text(
        f"""[[datasets]]
batch_size = 1
caption_dropout_rate = 0.5
[[datasets.subsets]]
image_dir = '{folder / "train" / "3_cat"}'
caption_prefix = "P"
[[datasets]]
resolution = 96
caption_dropout_rate = 0.5
[[datasets.subsets]]
image_dir = '{folder / "train" / "3_cat"}'
num_repeats = 2
""",
        encoding="utf-8",
    )
    options = OPTIONS | {"dataset_config": config}
    found = dataset_metadata(make_scan(**options), DatasetOptions(**options))
    assert json.loads(found["ss_dataset_dirs"]) == {
        "3_cat": {"n_repeats": 1, "img_count": 2},
        "3_cat (2)": {"n_repeats": 2, "img_count": 2},
    }
    first, second = json.loads(found["ss_datasets"])
    assert (first["batch_size_per_device"], second["batch_size_per_device"]) == (1, 2)
    assert (first["resolution"], second["resolution"]) == ([64, 64], [96, 96])
    assert second["num_train_images"] == 4
    assert first["is_dreambooth"] is True
    assert first["tag_frequency"] == {"3_cat": {"cat": 2, "tabby": 1, "dog": 1}}
    (subset,) = first["subsets"]
    assert (subset["image_dir"], subset["caption_prefix"]) == ("3_cat", "P")
    assert found["ss_caption_dropout_rate"] == "0.5"
    assert str(folder) not in "".join(found.values())
