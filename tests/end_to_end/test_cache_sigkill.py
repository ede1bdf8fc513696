"""SIGKILL while a cache is filled: what was encoded is whole, and is not encoded again."""

from __future__ import annotations

import logging
import shutil
import signal
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from sdxl_train.data.listing import CACHE_FOLDER

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from tests.end_to_end.conftest import MakeOptions, StartProcess, TrainLora


def test_a_killed_run_leaves_whole_entries_and_the_next_goes_on_after_them(
    start_process: StartProcess,
    options: MakeOptions,
    train_lora: TrainLora,
    photographs: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    changes = {"train_data_dir": str(folder), "cache_latents_to_disk": True}
    cache = folder / "2_photo" / CACHE_FOLDER

    def entries() -> dict[str, int]:
        found = list(cache.glob("latents-*.safetensors"))
        assert all(map(load_file, found))
        return {path.name: path.stat().st_mtime_ns for path in found}

    kept: dict[str, int] = {}
    for _ in range(2):
        place = ("sdxl_train.data.entry_file:Entry.write", 2)
        run = start_process(options(plugin=None, **changes), hold=place)
        run.wait_until_held()
        run.send(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert entries().items() > kept.items()
        kept = entries()
    assert len(kept) == 2
    with caplog.at_level(logging.INFO, logger="sdxl_train"):
        train_lora(**changes)
    told = [r.getMessage() for r in caplog.records if "latents on disk: " in r.getMessage()]
    assert "latents on disk: 3 built, 2 reused" in told
    assert entries().items() > kept.items()
    assert len(entries()) == 5
