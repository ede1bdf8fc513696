"""``bench/gpu.py`` in miniature: a run accepts its rows, and it goes on where it stopped."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from sdxl_train.cli import main
from sdxl_train.plugins import PluginHost
from sdxl_train.registry import Registry
from sdxl_train.resolve import Resolver
from sdxl_train.rules import rule_problems
from sdxl_train.settings import from_words

if TYPE_CHECKING:
    from types import ModuleType

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.py"
FIGURES = {
    "ours": {
        "seconds_per_step": 0.5,
        "images_per_second": 2.0,
        "tflops": 29.2,
        "mfu": 0.25,
        "peak_bytes": 10**10,
    },
    "ratio": None,
    "machine": {"device": "H200"},
    "versions": {"torch": "2.13.0"},
    "settings": {"train_batch_size": 1},
}


@pytest.fixture
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    gpu.main()


def test_every_row_is_settings_that_a_run_accepts(gpu: ModuleType) -> None:
    host = PluginHost()
    rows = gpu.settings()
    assert len(rows) == 1 + 12 + len(gpu.LEVERS) + 3 * len(gpu.COMBINATIONS)
    for name, flags in rows.items():
        words = [*flags, "--pretrained_model_name_or_path", "model", "--output_dir", "out"]
        words += ["--mixed_precision", "bf16", "--network_train_unet_only", "--cache_latents"]
        settings, _ = from_words([word for word in words if word != "--compare"], [])
        resolution = Resolver(settings, host, Registry(host)).resolve()
        assert resolution.problems == [], name
        assert resolution.config is not None
        model: Any = resolution.config.model
        problems = [*rule_problems(resolution.config, None)]
        problems += model.memory_problems(resolution.config)
        assert problems == [], name


def test_a_row_is_measured_and_told(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(words: list[str], **_: object) -> SimpleNamespace:
        out = io.StringIO()
        with redirect_stdout(out):  # here, for a process of its own imports for seconds
            code = main(words[1:])
        return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    file = tmp_path / "figures.json"
    tiny = ("--tiny", "--steps", "1", "--warmup", "1", "--resolution", "32")
    call(gpu, monkeypatch, str(file), "--only", "lever-channels-last", "--bench", *tiny)
    (figures,) = json.loads(file.read_text(encoding="utf-8")).values()
    assert figures["settings"]["channels_last"] is True
    assert figures["versions"]["torch"]
    call(gpu, monkeypatch, str(file), "--table")
    assert "| lever-channels-last | " in capsys.readouterr().out


def test_calls_go_on_where_the_last_one_stopped(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done: list[list[str]] = []
    answers: list[dict[str, Any] | None] = [FIGURES, {"error": "out of memory"}, None, None]

    def measure(flags: list[str], seconds: float) -> dict[str, Any] | None:
        done.append(flags)
        return answers.pop(0) if answers else FIGURES

    monkeypatch.setattr(gpu, "measure", measure)
    file = str(tmp_path / "figures.json")
    call(gpu, monkeypatch, file, "--only", "batch1-rank")
    assert len(done) == 3  # the third row had no time left
    call(gpu, monkeypatch, file, "--only", "batch1-rank")
    assert done[3] == done[2]  # had all the time there is, and is not tried a third time
    assert len(done) == 5
    call(gpu, monkeypatch, file, "--only", "batch1-rank")
    assert len(done) == 5
    call(gpu, monkeypatch, file, "--table")
    lines = capsys.readouterr().out.splitlines()
    assert "| batch1-rank16 | 0.5 | 2 | 29.2 | 25.0% | 10.00 | 1.00 |  |" in lines
    assert "| batch1-rank16-checkpointing | out of memory | | | | | | |" in lines
    assert "| batch1-rank64 | not done in 9 minutes | | | | | | |" in lines
