"""``--debug_dataset`` writes what is trained, and trains nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

import sdxl_train
from sdxl_train.cli import main
from sdxl_train.data.batches import BatchPlan
from sdxl_train.data.dataset_config import DatasetOptions, resolve_datasets
from sdxl_train.data.preview import MOST_SAMPLES, write_preview
from sdxl_train.data.sources import scan

if TYPE_CHECKING:
    from tests.end_to_end.conftest import MakeOptions, StartCommand


def plan_of(**options: Any) -> BatchPlan:
    configs, problems, _ = resolve_datasets(DatasetOptions(**options), lambda name: name)
    assert problems == []
    found = scan(configs, bucket_multiple=8, place=lambda name: name)
    assert found.problems == ()
    return BatchPlan(found.datasets, 3)


def facts_of(page: Path) -> list[dict[str, Any]]:
    facts: list[dict[str, Any]] = json.loads((page.parent / "samples.json").read_text())
    return facts


def test_the_command_writes_a_page_and_ends(
    options: MakeOptions, start_command: StartCommand
) -> None:
    chosen = options(debug_dataset=True, shuffle_caption=True)
    process = start_command(chosen)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    folder = Path(chosen["output_dir"]) / "debug_dataset"
    assert f"open {folder / 'index.html'}" in output
    assert [path.name for path in folder.parent.iterdir()] == ["debug_dataset"]
    facts = facts_of(folder / "index.html")
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "10 of 10 samples of the first epoch" in page
    for fact in facts:
        assert (folder / fact["file"]).is_file()
        assert fact["file"] in page
        assert sorted(fact["caption"].split(", ")) == sorted(fact["original_caption"].split(", "))
        assert fact["caption"] in page
    images = [Path(fact["image"]).stem for fact in facts]
    assert {image: images.count(image) for image in images} == dict.fromkeys(images, 2)


def test_pictures_show_the_crop_the_sample_and_its_mask(tmp_path: Path) -> None:
    (tmp_path / "1_x").mkdir()
    (tmp_path / "masks").mkdir()
    # Red on the left, blue on the right; the crop is the middle half of the width.
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :64, 0] = pixels[:, 64:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "1_x" / "a<b.png")
    mask = np.zeros((64, 128), np.uint8)
    mask[:32] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "a<b.png")
    plan = plan_of(
        train_data_dir=tmp_path,
        conditioning_data_dir=tmp_path / "masks",
        masked_loss=True,
        resolution=64,
    )
    page = write_preview(plan, tmp_path / "out")
    (fact,) = facts_of(page)
    assert fact["size"] == [128, 64]
    assert fact["bucket"] == [64, 64]
    assert fact["crop_left_top"] == [32, 0]
    assert fact["caption"] == "x"
    assert "a&lt;b.png" in page.read_text(encoding="utf-8")
    sheet = np.asarray(Image.open(page.parent / fact["file"]).convert("RGB")).astype(int)
    # The whole image, a gap, the sample, a gap, the mask.
    assert sheet.shape == (64, 128 + 8 + 64 + 8 + 64, 3)
    whole, sample, weights = sheet[:, :128], sheet[:, 136:200], sheet[:, 208:]
    assert (whole[1:-1, 33:63] == [255, 0, 0]).all()
    assert (whole[20, 32] == [255, 0, 0]).all()
    assert (whole[20, 95] == [255, 0, 0]).all()  # the box, on blue
    assert (whole[20, 94] == [0, 0, 255]).all()
    assert (sample == pixels[:, 32:96]).all()
    assert (weights[:32] == 255).all()
    assert (weights[32:] == 0).all()


def test_a_name_that_is_no_text_is_shown_escaped(tmp_path: Path) -> None:
    (tmp_path / "1_x").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "1_x" / os.fsdecode(b"\xff.png"))
    page = write_preview(plan_of(train_data_dir=tmp_path, resolution=8), tmp_path / "out")
    (fact,) = facts_of(page)
    assert os.fsencode(fact["image"]).endswith(b"/\xff.png")
    assert r"\udcff.png" in page.read_text(encoding="utf-8")


def test_no_more_samples_are_written_than_one_looks_at(tmp_path: Path) -> None:
    (tmp_path / "300_x").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "300_x" / "a.png")
    plan = plan_of(train_data_dir=tmp_path, resolution=8, train_batch_size=7)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "sample-9999.png").write_bytes(b"of an earlier time")
    page = write_preview(plan, folder)
    facts = facts_of(page)
    assert len(facts) == MOST_SAMPLES // 7 * 7
    assert f"{len(facts)} of 300 samples" in page.read_text(encoding="utf-8")
    assert len(list(folder.glob("sample-*.png"))) == len(facts)


def test_python_and_the_plan_refuse_it(
    options: MakeOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = options(debug_dataset=True)
    with pytest.raises(sdxl_train.UserError, match="trains nothing"):
        sdxl_train.train(chosen)
    assert main(["plan", "--debug_dataset"]) == 2
    assert "leave out `plan`" in capsys.readouterr().err
