"""``sdxl-train bench``, in miniature: the command, its figures, what it refuses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from sdxl_lora_plugins.commands.bench_figures import Figures, Stopwatch, training_flops
from sdxl_train.cli import main

if TYPE_CHECKING:
    from pathlib import Path

QUICK = ["bench", "--tiny", "--steps", "2", "--warmup", "1", "--resolution", "32"]
PHASES = ["data", "forward", "backward", "optimizer", "hooks", "logging"]


def test_both_loops_are_measured_in_turns(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--compare", "--json", "--network_dim", "3", "--train_batch_size", "2"]
    words += ["--gradient_accumulation_steps", "2", "--mixed_precision", "no"]
    assert main([*QUICK, *words, "--gradient_checkpointing"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert list(found["ours"]["breakdown"]) == PHASES
    assert set(found["plain"]["breakdown"]) < set(PHASES)
    for loop in (found["ours"], found["plain"]):
        assert loop["images_per_second"] == pytest.approx(4 / loop["seconds_per_step"])
        assert loop["tflops"] == pytest.approx(found["tflop_per_step"] / loop["seconds_per_step"])
        assert loop["mfu"] == pytest.approx(loop["tflops"] / found["ceiling_tflops"])
        assert loop["peak_bytes"] > 10e6
    ours, plain = (found[loop]["seconds_per_step"] for loop in ("ours", "plain"))
    assert found["ratio"] == pytest.approx(plain / ours)
    assert found["settings"]["network_dim"] == 3
    assert found["settings"]["gradient_checkpointing"] is True
    assert found["versions"]["torch"] == torch.__version__


def test_settings_of_a_training_are_taken_over_without_its_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        'pretrained_model_name_or_path = "no-such-model"\ntrain_data_dir = "nowhere"\n'
        'output_dir = "out"\noptimizer_type = "SGD"\ntext_encoder_lr = 1e-5\n'
        'network_args = ["dora_wd=true"]\n',
        encoding="utf-8",
    )
    assert main([*QUICK, "--config_file", str(config)]) == 0
    out = capsys.readouterr().out
    assert "optimizer_type SGD" in out
    assert "network_args.dora_wd True" in out
    assert "network_train_unet_only" not in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rounds", "3"], "--rounds: has no effect without --compare"),
        (["--gradient_chekpointing"], "did you mean gradient_checkpointing"),
        (["--resolution", "many"], "--resolution: ['many'] is not a resolution"),
        (["word"], "unexpected word 'word'"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_measured(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--tiny", *words]) == 2
    assert told in capsys.readouterr().err


def test_help_tells_that_the_flags_of_training_apply(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--compare" in out
    assert "the flags of training" in out


def test_a_full_size_step_has_as_many_operations_as_were_counted_by_hand() -> None:
    # Counted layer by layer: 6.761 TFLOP forward at 1024 x 1024, and 14.6 with the backward pass
    # through every layer and rank 16. The layers before the first adapted one need no backward
    # pass: two ResNet blocks and their neighbours, 3 convolutions of 320 channels at 128 x 128 at
    # the least.
    spared = 3 * 2 * 9 * 320**2 * 128**2 / 1e12
    assert 2 * 6.761 < training_flops("full", (1024, 1024), 16) / 1e12 < 14.6 - spared


def test_the_breakdown_is_of_the_measured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1, 3, 7, 8, 108, 110, 112, 116])
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    stopwatch = Stopwatch(torch.device("cpu"))
    for phase in ("data", "forward", "backward", "optimizer", "saving", "data", "forward"):
        stopwatch.lap(phase)
    stopwatch.lap("backward")
    first, second = stopwatch.steps()
    assert first == {"data": 1, "forward": 2, "backward": 4, "optimizer": 1}
    assert second == {"data": 2, "forward": 2, "backward": 4}
    figures = Figures.of([first, second], peak=5, images=2, flops=16e12, ceiling=4e12)
    assert figures.seconds_per_step == 8
    assert (figures.images_per_second, figures.tflops, figures.mfu) == (0.25, 2, 0.5)
    assert figures.breakdown == {"data": 1.5, "forward": 2, "backward": 4, "optimizer": 0.5}
