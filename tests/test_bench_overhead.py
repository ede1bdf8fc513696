"""What the framework adds to the maths of a step stays small: a ratio, whatever the machine."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench" / "overhead.py"

LIMIT = 1.25
"""Measured: 1.02 to 1.06, on a machine busy with many other programs."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_step_costs_little_more_than_its_maths() -> None:
    found = runpy.run_path(str(BENCH))["measure"](steps=16)
    assert found["steps"] == 16
    # The median of pairs of steps that follow each other, in seconds of the processor.
    assert 0.8 < found["ratio"] < LIMIT
    assert {"data", "forward", "backward", "optimizer", "logging", "hooks"} == set(
        found["phases_s"]
    )


def test_rows_of_a_gpu_are_measured_once_and_tabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = BENCH.with_name("gpu.py")
    file = tmp_path / "rows.json"
    tiny = ["--tiny", "--steps", "1", "--warmup", "1", "--resolution", "32"]
    words = [str(script), str(file), "--only", "batch1-rank16", "--bench", *tiny]
    # The second row of that name is there, so that one call of the command is made.
    file.write_text(json.dumps({"batch1-rank16-checkpointing": {"error": "out of memory"}}))
    for _ in range(2):
        monkeypatch.setattr("sys.argv", words)
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.count("batch1-rank16 ") == 1
    monkeypatch.setattr("sys.argv", [str(script), str(file), "--table"])
    runpy.run_path(str(script), run_name="__main__")
    rows = capsys.readouterr().out.splitlines()
    assert rows[2] == "| batch1-rank16-checkpointing | out of memory | | | | |"
    assert rows[3].startswith("| batch1-rank16 | ")
