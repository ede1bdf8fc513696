"""Training in fp16, whose gradients are scaled; here on the CPU, which torch can and users may not.

Only the checks for a GPU, ours and that of accelerate, are passed by; autocast, scaler, skipped
steps and states are those of a GPU.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch

from sdxl_train import TrainingError
from sdxl_train.accelerator import make_accelerator

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator

    from sdxl_train.config import RunConfig
    from tests.end_to_end.conftest import SameTensors, TrainLora

TOO_LARGE = 2.0**23
"""A scale at which the gradients of the tiny model overflow fp16."""

ENDLESS_SLOPE = '''
"""A loss whose value is 0 and whose slope is not finite."""
from sdxl_train import Loss, hookimpl


class EndlessSlope(Loss):
    """The root of 0."""

    def build(self, schedule):
        return lambda prediction, target, timesteps: (prediction - prediction).sqrt()


@hookimpl
def register_losses():
    return {"endless-slope": EndlessSlope}
'''


@pytest.fixture
def first_scale(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let fp16 train on the CPU; gives the scale at the start, to be changed."""
    scales = [2.0**16]

    def make(config: RunConfig) -> Accelerator:
        if config.training.mixed_precision != "fp16":
            return make_accelerator(config)
        training = config.training.model_copy(update={"mixed_precision": "no"})
        accelerator = make_accelerator(replace(config, training=training))
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scales[0], growth_interval=2)
        return accelerator

    monkeypatch.setattr("sdxl_train.run.make_accelerator", make)
    monkeypatch.setattr("sdxl_train.preflight.machine_problems", lambda config: ())
    return scales


def test_fp16_trains_like_fp32_and_saves_fp32(
    first_scale: list[float], train_lora: TrainLora
) -> None:
    exact = train_lora(mixed_precision="no", max_train_steps=2)
    mixed = train_lora(mixed_precision="fp16", max_train_steps=2)

    losses = [step["loss"] for step in exact.steps]
    # fp16 has eleven bits of precision.
    assert [step["loss"] for step in mixed.steps] == pytest.approx(losses, rel=0.005)
    assert [step["loss"] for step in mixed.steps] != losses
    norms = [step["grad_norm"] for step in exact.steps]
    assert [step["grad_norm"] for step in mixed.steps] == pytest.approx(norms, rel=0.05)
    assert {tensor.dtype for tensor in mixed.tensors.values()} == {torch.float32}
    assert mixed.result.skipped_steps == 0


@pytest.mark.parametrize(
    ("full_fp16", "resumed_after"),
    [pytest.param(False, 4, id="mixed"), pytest.param(True, 1, id="full, before any step")],
)
def test_skipped_steps_are_counted_and_a_resumed_run_is_the_straight_one(
    first_scale: list[float],
    train_lora: TrainLora,
    same_tensors: SameTensors,
    caplog: pytest.LogCaptureFixture,
    full_fp16: bool,
    resumed_after: int,
) -> None:
    first_scale[0] = TOO_LARGE
    options = {
        "mixed_precision": "fp16",
        "full_fp16": full_fp16,
        "max_train_steps": 5,
        "network_train_unet_only": True,
        "lr_scheduler": "linear",
        "save_state_every_n_steps": 1,
        "save_state_on_train_end": True,
        "progress": True,
    }
    straight = train_lora(**options)
    states = [straight.folder / f"photo-step{step:08d}-state" for step in range(1, 5)]
    scales = [json.loads((s / "details.json").read_text())["scaler"]["scale"] for s in states]
    # A skipped step halves the scale, and two good ones in a row double it.
    halved = [second < first for first, second in pairwise([TOO_LARGE, *scales])]

    assert halved[0]
    assert not all(halved)
    skipped = straight.result.skipped_steps
    assert sum(halved) <= skipped <= sum(halved) + 1
    record = json.loads((straight.folder / "photo.run.json").read_text())
    assert record["results"]["skipped_steps"] == skipped
    assert f"{skipped} skipped" in caplog.text
    rates = [step["learning_rates"]["unet"] for step in straight.steps]
    moved = [second < first for first, second in pairwise(rates)]
    assert moved == [not skip for skip in halved]  # the schedule counts what was done

    first_scale[0] = 1.0
    resumed = train_lora(**options, resume=str(states[resumed_after - 1]))
    assert same_tensors(resumed.tensors, straight.tensors)
    assert resumed.result.skipped_steps == skipped
    ends = [
        json.loads((run.folder / "photo-state" / "details.json").read_text())
        for run in (straight, resumed)
    ]
    for name in ("scaler", "scheduler", "optimizer"):
        assert ends[0][name] == ends[1][name]


def test_a_run_that_only_skips_is_stopped(
    first_scale: list[float],
    train_lora: TrainLora,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdxl_train.loop.MAX_SKIPPED_IN_A_ROW", 3)
    plugin = tmp_path / "endless_slope.py"
    plugin.write_text(ENDLESS_SLOPE)

    with pytest.raises(TrainingError, match="step 4: the last 4 steps were all skipped"):
        train_lora(
            mixed_precision="fp16",
            plugin=[str(plugin)],
            loss_type="endless-slope",
            max_train_steps=9,
            output_dir=str(tmp_path / "out"),
        )

    record = json.loads((tmp_path / "out" / "photo.run.json").read_text())
    assert record["results"]["skipped_steps"] == 3
    assert record["results"]["status"].startswith("failed")


def test_a_loss_that_is_not_finite_stops_fp16_too(
    first_scale: list[float], train_lora: TrainLora, tmp_path: Path
) -> None:
    plugin = tmp_path / "endless.py"
    plugin.write_text(ENDLESS_SLOPE.replace("sqrt()", "reciprocal()"))

    with pytest.raises(TrainingError, match="step 1: the loss is not finite"):
        train_lora(mixed_precision="fp16", plugin=[str(plugin)], loss_type="endless-slope")
