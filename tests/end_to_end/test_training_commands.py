"""The installed command: what it plans it does, how it fails, and how it stops.

The processes run at the same time; each test looks at one.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

import sdxl_train
from sdxl_train import TrainingError

if TYPE_CHECKING:
    import torch

    from tests.end_to_end.conftest import (
        MakeOptions,
        SameTensors,
        StartCommand,
        Trained,
        TrainLora,
    )

PLANNED: dict[str, Any] = {
    # Five batches an epoch: a step of three and a step of two.
    "gradient_accumulation_steps": 3,
    "max_train_steps": None,
    "max_train_epochs": 3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": "34%",
    "save_every_n_epochs": 1,
    "save_every_n_steps": 5,
    "unet_lr": 1e-3,
    "text_encoder_lr": [2e-4, 1e-4],
}

STOPPER = '''
"""Sends the process a signal after its third step."""
import os
import signal

from sdxl_train import hookimpl


@hookimpl
def step_finished(step):
    if step.step == 3:
        os.kill(os.getpid(), signal.{name})
'''

FAULTY = '''
"""A loss that is wrong at the third step."""
from sdxl_train import Loss, hookimpl

_calls = []


class Faulty(Loss):
    """Squared error; at the third step {what}."""

    def build(self, schedule):
        _calls.clear()

        def loss(prediction, target, timesteps):
            _calls.append(timesteps)
            error = (prediction - target).square()
            return {fault} if len(_calls) == 3 else error

        return loss


@hookimpl
def register_losses():
    return {{"faulty": Faulty}}
'''

NAN_LOSS = FAULTY.format(what="not a number", fault="error * float('nan')")
# The root of 0 has no finite derivative.
NAN_GRADIENT = FAULTY.format(what="0 with an infinite slope", fault="(error * 0).sqrt()")

LAUNCH = (
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--num_processes", "1", "--num_cpu_threads_per_process", "1", "-m", "sdxl_train"),
)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A process that has ended."""

    code: int
    out: str
    err: str
    folder: Path

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a file that it wrote."""
        return load_file(self.folder / f"{name}.safetensors")

    @property
    def networks(self) -> list[str]:
        """The names of the networks that it wrote."""
        return sorted(path.stem for path in self.folder.glob("*.safetensors"))

    @property
    def record(self) -> dict[str, Any]:
        """What it recorded of itself."""
        record: dict[str, Any] = json.loads((self.folder / "photo.run.json").read_text("utf-8"))
        return record


@pytest.fixture(scope="module")
def finished(
    options: MakeOptions, start_command: StartCommand, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Finished]:
    """Every process that the tests here look at."""
    folder = tmp_path_factory.mktemp("plugins")

    def plugin(name: str, text: str) -> list[str]:
        path = folder / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        return [str(path)]

    cases = {
        "launched": options(plugin=None, max_train_steps=1),
        "nan": options(
            plugin=plugin("nan_loss", NAN_LOSS), loss_type="faulty", save_every_n_steps=1
        ),
        "SIGTERM": options(
            plugin=plugin("terminate", STOPPER.format(name="SIGTERM")), max_train_steps=100_000
        ),
    }
    started = {
        name: start_command(chosen, launcher=LAUNCH)
        if name == "launched"
        else start_command(chosen)
        for name, chosen in cases.items()
    }
    ended = {}
    for name, process in started.items():
        out, err = process.communicate(timeout=300)
        ended[name] = Finished(
            code=process.returncode, out=out, err=err, folder=Path(cases[name]["output_dir"])
        )
    return ended


@pytest.fixture(scope="module")
def uninterrupted(train_lora: TrainLora) -> Trained:
    """The same run in this process."""
    return train_lora(save_every_n_steps=1)


def test_accelerate_launches_the_same_run(
    finished: dict[str, Finished], uninterrupted: Trained, same_tensors: SameTensors
) -> None:
    launched = finished["launched"]
    assert launched.code == 0, launched.err
    expected = load_file(uninterrupted.folder / "photo-step00000001.safetensors")
    assert same_tensors(launched.tensors("photo"), expected)
    assert str(launched.folder / "photo.safetensors") in launched.out


def test_output_shows_no_traceback_and_no_warning_of_python(finished: dict[str, Finished]) -> None:
    for process in finished.values():
        text = process.err
        assert "Traceback" not in text, text
        assert "Warning:" not in text, text


def test_nan_stops_the_run_and_keeps_what_was_saved(
    finished: dict[str, Finished], uninterrupted: Trained, same_tensors: SameTensors
) -> None:
    nan = finished["nan"]
    assert nan.code == 1
    assert "step 3" in nan.err
    assert "loss is not finite" in nan.err
    named = uninterrupted.steps[2]["keys"]
    assert all(key in nan.err for key in named)
    assert nan.networks == ["photo-step00000001", "photo-step00000002"]
    for name in nan.networks:
        expected = load_file(uninterrupted.folder / f"{name}.safetensors")
        assert same_tensors(nan.tensors(name), expected)
    assert nan.record["results"]["status"].startswith("failed: TrainingError: step 3")
    assert nan.record["results"]["steps"] == 2


def test_gradient_that_is_not_finite_stops_the_run_too(
    options: MakeOptions, tmp_path: Path
) -> None:
    plugin = tmp_path / "nan_gradient.py"
    plugin.write_text(NAN_GRADIENT, encoding="utf-8")
    chosen = options(plugin=[str(plugin)], loss_type="faulty", save_every_n_steps=2)
    with pytest.raises(TrainingError, match="step 3: the gradient is not finite"):
        sdxl_train.train(chosen)
    assert [p.stem for p in Path(chosen["output_dir"]).glob("*.safetensors")] == [
        "photo-step00000002"
    ]


def test_sigterm_saves_the_step_it_interrupts(
    finished: dict[str, Finished], uninterrupted: Trained, same_tensors: SameTensors
) -> None:
    stopped = finished["SIGTERM"]
    assert stopped.code == 143, stopped.err
    assert "SIGTERM: finishing this step" in stopped.err
    assert_saved(stopped, uninterrupted, same_tensors)


def test_sigint_saves_the_step_it_interrupts(
    options: MakeOptions, tmp_path: Path, uninterrupted: Trained, same_tensors: SameTensors
) -> None:
    plugin = tmp_path / "interrupt.py"
    plugin.write_text(STOPPER.format(name="SIGINT"), encoding="utf-8")
    chosen = options(plugin=[str(plugin)], max_train_steps=100_000)
    handler = signal.getsignal(signal.SIGINT)
    result = sdxl_train.train(chosen)
    assert result.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    folder = Path(chosen["output_dir"])
    stopped = Finished(code=130, out="", err="", folder=folder)
    assert_saved(stopped, uninterrupted, same_tensors)


def assert_saved(stopped: Finished, uninterrupted: Trained, same_tensors: SameTensors) -> None:
    (saved,) = stopped.networks
    step = int(saved.removeprefix("photo-step"))
    # The signal comes after step 3; the step that runs meanwhile is finished.
    assert step in (3, 4)
    expected = load_file(uninterrupted.folder / f"{saved}.safetensors")
    assert same_tensors(stopped.tensors(saved), expected)
    assert stopped.record["results"]["status"] == "interrupted"
    assert stopped.record["results"]["steps"] == step
    assert list(stopped.folder.glob("*-state"))


def test_run_matches_its_plan(options: MakeOptions, train_lora: TrainLora) -> None:
    chosen = options(**PLANNED)
    plan = json.loads(json.dumps(sdxl_train.plan(chosen).as_json()))
    assert list(Path(chosen["output_dir"]).iterdir()) == []
    run = train_lora(**PLANNED)

    assert plan["errors"] == []
    assert plan["steps"] == {
        "batches_per_epoch": 5,
        "epochs": 3,
        "optimizer_steps": 6,
        "processes": 1,
        "warmup_steps": 2,
    }
    assert [step["step"] for step in run.steps] == list(range(1, 7))
    assert [step["epoch"] for step in run.steps] == [1, 1, 2, 2, 3, 3]
    for epoch in (1, 2, 3):
        keys = sorted(key for s in run.steps if s["epoch"] == epoch for key in s["keys"])
        assert len(keys) == plan["dataset"]["repeats"] == 10
        assert len(set(keys)) == plan["dataset"]["images"] == 5
    # The wide photographs are 75x50: 64x32 is all that their buckets leave of them.
    cut = round(1 - 64 * 32 / (75 * 50), 4)
    assert [
        (b["resolution"], b["images"], b["crop_share"]) for b in plan["dataset"]["buckets"]
    ] == [
        ([64, 32], 2, cut),
        ([64, 64], 3, 0),
    ]
    saved = {steps_of(path) for path in run.result.files}
    assert plan["saves"] == sorted(saved) == [2, 4, 5, 6]

    rates = {group["name"]: group["lr"] for group in plan["groups"]}
    assert rates == {"unet": 1e-3, "textencoder te1": 2e-4, "textencoder te2": 1e-4}
    # Two steps of warm-up from 0; after them the cosine starts at the full rate.
    assert run.steps[2]["learning_rates"] == pytest.approx(rates)
    assert set(run.steps[0]["learning_rates"].values()) == {0.0}

    factors = {name: tensor for name, tensor in run.tensors.items() if tensor.ndim}
    assert sum(group["tensors"] for group in plan["groups"]) == len(factors)
    for part, prefix in (("unet", "lora_unet_"), ("te1", "lora_te1_"), ("te2", "lora_te2_")):
        own = [tensor for name, tensor in factors.items() if name.startswith(prefix)]
        assert plan["modules"][part]["modules"] == len(own) // 2
        assert plan["modules"][part]["parameters"] == sum(tensor.numel() for tensor in own)
    numbers = sum(tensor.numel() for tensor in factors.values())
    assert plan["memory"]["network_bytes"] == 4 * numbers


def steps_of(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["ss_steps"])
