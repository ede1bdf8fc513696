"""A run from caches on the disk is the run without them, bit for bit."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from torch import Tensor

    from tests.end_to_end.conftest import SameTensors, TrainLora

CACHES = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}


def test_caches_serve_the_next_run_and_notice_an_edit(
    train_lora: TrainLora,
    photographs: Path,
    tmp_path: Path,
    same_tensors: SameTensors,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    common = {"train_data_dir": str(folder), "network_train_unet_only": True, "flip_aug": True}

    def reports(**options: bool) -> tuple[dict[str, Tensor], list[str]]:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="sdxl_train"):
            trained = train_lora(**common, **options)
        lines = [record.getMessage() for record in caplog.records]
        return trained.tensors, [line for line in lines if " on disk: " in line]

    plain, none = reports()
    first, built = reports(**CACHES)
    second, reused = reports(**CACHES, skip_cache_check=True)
    assert none == []
    assert built == ["latents on disk: 10 built", "captions on disk: 5 built"]
    assert reused == ["latents on disk: 10 reused", "captions on disk: 5 reused"]
    assert same_tensors(plain, first)
    assert same_tensors(plain, second)

    Image.new("RGB", (64, 64), "red").save(folder / "2_photo" / "coffee.png")
    edited, rebuilt = reports(**CACHES)
    assert rebuilt[0] == "latents on disk: 2 rebuilt (the image changed), 8 reused"
    uncached, _ = reports()
    assert same_tensors(edited, uncached)
    assert not same_tensors(edited, plain)
