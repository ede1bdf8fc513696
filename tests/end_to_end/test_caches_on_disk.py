"""A run from caches on the disk is the run without them, bit for bit."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sdxl_train.cli import main
from sdxl_train.data.entry_file import Entry
from sdxl_train.data.listing import CACHE_FOLDER
from tests.end_to_end.conftest import as_flags

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest
    from torch import Tensor

    from tests.end_to_end.conftest import MakeOptions, SameTensors, StartCommand, TrainLora

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
        told = [line for line in lines if " on disk: " in line and "to make" not in line]
        return trained.tensors, told

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


def test_cached_in_memory_or_on_disk_in_any_precision_the_weights_are_the_same(
    train_lora: TrainLora, photographs: Path, tmp_path: Path, same_tensors: SameTensors
) -> None:
    """In bf16, with captions dropped and images mirrored, at two resolutions."""
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    config = tmp_path / "data.toml"
    config.write_text(
        "[general]\nflip_aug = true\ncaption_dropout_rate = 0.5\nenable_bucket = true\n"
        "min_bucket_reso = 32\nbucket_reso_steps = 32\n"
        + "".join(
            f"[[datasets]]\nresolution = {size}\n[[datasets.subsets]]\n"
            f"image_dir = '{folder / '2_photo'}'\n"
            for size in (64, 32)
        )
    )
    common = {
        "train_data_dir": None,
        "resolution": None,
        "enable_bucket": None,
        "bucket_no_upscale": None,
        "bucket_reso_steps": None,
        "dataset_config": str(config),
        "mixed_precision": "bf16",
        "network_train_unet_only": True,
        "max_train_steps": 3,
    }
    plain = train_lora(**common).tensors
    memory = train_lora(**common, cache_latents=True, cache_text_encoder_outputs=True).tensors
    disk = train_lora(**common, **CACHES).tensors
    assert same_tensors(plain, memory)
    assert same_tensors(plain, disk)


def test_two_processes_cache_one_folder_at_once_and_prune_what_is_left(
    start_command: StartCommand,
    options: MakeOptions,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catalogue 87. The command needs no output_dir."""
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    chosen = options(
        train_data_dir=str(folder), output_dir=None, network_train_unet_only=True, **CACHES
    )
    command = (str(Path(sys.executable).with_name("sdxl-train")), "cache")
    both = [start_command(chosen, launcher=command) for _ in range(2)]
    told = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    for text in told:  # what one has made already, the other uses
        (report,) = re.findall(r"captions on disk: (.*(?:built|reused).*)", text)
        assert sum(int(count) for count in re.findall(r"\d+", report)) == 5

    def run(*words: str, **changes: bool) -> str:
        assert main(["cache", *words, *as_flags({**chosen, **changes})]) == 0
        captured = capsys.readouterr()
        return captured.out + captured.err

    assert "latents on disk: 5 built, 5 reused" in run(flip_aug=True)
    kept = folder / "2_photo" / CACHE_FOLDER
    assert len(list(kept.iterdir())) == 15
    assert "5 files removed" in run("--prune")
    assert len(list(kept.iterdir())) == 10


def test_an_interrupted_command_keeps_what_is_done(
    options: MakeOptions,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    words = as_flags(options(train_data_dir=str(folder), cache_latents_to_disk=True))
    write = Entry.write
    written: list[str] = []

    def interrupted(entry: Entry, tensors: Mapping[str, Tensor]) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(entry.name)
        write(entry, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Entry, "write", interrupted)
        assert main(["cache", *words]) == 130
    assert "interrupted; what is encoded is kept" in capsys.readouterr().err
    assert main(["cache", *words]) == 0
    assert "latents on disk: 3 built, 2 reused" in capsys.readouterr().err


def test_the_cache_command_refuses_to_keep_nothing(
    options: MakeOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", *as_flags(options(cache_latents=True))]) == 2
    assert "--cache_latents: keeps nothing on the disk" in capsys.readouterr().err
