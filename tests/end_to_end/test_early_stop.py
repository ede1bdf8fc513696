"""A run stops when held-out images get no better, keeps the best network, and resumes exactly."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

import sdxl_train
from sdxl_train import UserError, ValidationResult
from sdxl_train.validation import best_of, patience_is_over

if TYPE_CHECKING:
    from tests.end_to_end.conftest import MakeOptions, SameTensors, Trained, TrainLora

WATCHED: dict[str, Any] = {
    "validation_split": 0.4,
    "validate_every_n_steps": 1,
    "validate_every_n_epochs": 0,
    "max_train_steps": 12,
    # So high that it soon gets worse.
    "learning_rate": 1.0,
    "lr_scheduler": "constant",
    "save_every_n_steps": 1,
    "save_state": True,
}


def results_of(*losses: float) -> list[ValidationResult]:
    return [
        ValidationResult(step=step, epoch=1, loss=loss, timesteps=(500,), losses=(loss,), images=1)
        for step, loss in enumerate(losses, start=1)
    ]


@pytest.mark.parametrize(
    ("losses", "over"),
    [
        ((3.0, 2.0, 1.0), False),
        ((1.0, 2.0), False),
        ((1.0, 2.0, 3.0), True),
        # No lower is no better.
        ((1.0, 1.0, 1.0), True),
        ((2.0, 3.0, 1.0, 2.0), False),
        ((1.0, math.nan, math.nan), True),
        ((math.nan, math.nan, math.nan), True),
        ((), False),
    ],
)
def test_patience_counts_results_in_a_row_that_are_no_lower(
    losses: tuple[float, ...], over: bool
) -> None:
    assert patience_is_over(results_of(*losses), 2) is over
    assert not patience_is_over(results_of(*losses), None)


def test_the_best_is_the_first_of_the_lowest() -> None:
    results = results_of(2.0, 1.0, 1.0, math.nan)
    best = best_of(results)
    assert best is not None
    assert best.step == 2


@pytest.fixture(scope="module")
def stopped(train_lora: TrainLora) -> Trained:
    return train_lora(**WATCHED, early_stop_patience=2, save_best=True)


def test_run_stops_when_patience_is_over(
    stopped: Trained, train_lora: TrainLora, same_tensors: SameTensors
) -> None:
    results, steps = stopped.result.validations, stopped.result.steps
    best = best_of(results)
    assert best is not None
    assert stopped.result.stopped_early
    assert stopped.result.exit_code == 0
    assert steps == best.step + 2 < WATCHED["max_train_steps"]
    record = json.loads((stopped.folder / "photo.run.json").read_text(encoding="utf-8"))
    assert record["results"]["status"] == "stopped early"
    # What is left out is what comes after, and nothing before is another.
    shorter = train_lora(**WATCHED | {"max_train_steps": steps})
    assert stopped.path.name == "photo.safetensors"
    assert stopped.metadata["ss_steps"] == str(steps)
    assert same_tensors(stopped.tensors, shorter.tensors)
    assert (stopped.folder / "photo-state" / "state.json").is_file()


def test_the_best_network_is_kept(stopped: Trained, same_tensors: SameTensors) -> None:
    best = best_of(stopped.result.validations)
    assert best is not None
    kept = stopped.result.files[0]
    assert kept.name == "photo-best.safetensors"
    at_best = stopped.folder / f"photo-step{best.step:08d}.safetensors"
    assert same_tensors(load_file(kept), load_file(at_best))


@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_run_stops_at_the_same_step(
    stopped: Trained, train_lora: TrainLora, same_tensors: SameTensors, step: int
) -> None:
    again = train_lora(
        **WATCHED,
        early_stop_patience=2,
        save_best=True,
        resume=str(stopped.folder / f"photo-step{step:08d}-state"),
    )
    assert again.result.validations == stopped.result.validations
    assert again.result.steps == stopped.result.steps
    assert same_tensors(again.tensors, stopped.tensors)


def test_a_run_that_stopped_early_is_complete(stopped: Trained, train_lora: TrainLora) -> None:
    again = train_lora(**WATCHED, early_stop_patience=2, resume=str(stopped.folder / "photo-state"))
    assert again.result.stopped_early
    assert again.result.steps == stopped.result.steps
    assert again.steps == []


def test_the_plan_says_when_validation_is_due(options: MakeOptions) -> None:
    plan = sdxl_train.plan(options(validation_split=0.4, max_train_steps=5))
    # Three images are trained twice in an epoch: four steps, or three if they share a bucket.
    per_epoch = plan.steps["batches_per_epoch"]
    assert plan.as_json()["validations"] == [per_epoch, 5]
    assert sdxl_train.plan(options()).validations == []


@pytest.mark.parametrize("asked", [{"early_stop_patience": 3}, {"save_best": True}])
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "none are held out"),
        ({"validation_split": 0.4, "validate_every_n_epochs": 0}, "never measured"),
    ],
)
def test_going_by_a_loss_that_is_not_measured_is_refused(
    options: MakeOptions, asked: dict[str, Any], given: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        sdxl_train.plan(options(**asked, **given))
