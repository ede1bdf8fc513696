"""Learning-rate schedules against sd-scripts' rates, step by step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError

from sdxl_lora_plugins import register_schedulers
from sdxl_train import StepPlan
from sdxl_train.config import TrainingOptions
from sdxl_train.counts import StepCounts
from sdxl_train.options import Setting, Words, validate

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdxl_train import Problem, RunConfig, Scheduler

STEPS = 100
RATES = (1e-3, 1e-4)


def rates(scheduler: Scheduler, plan: StepPlan) -> list[tuple[float, ...]]:
    """Give the rates of both groups at each step."""
    groups: list[dict[str, Any]] = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in RATES
    ]
    optimizer = torch.optim.SGD(groups)
    schedule = scheduler.build(optimizer, plan)
    used = []
    for _ in range(plan.total):
        used.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        schedule.step()
    return used


def plan_for(warmup: int | float) -> StepPlan:
    training = TrainingOptions(max_train_steps=STEPS)
    return StepCounts.of(training, batches_per_epoch=10, warmup=warmup).step_plan


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 0.1, 10])
def test_rates_equal_those_of_sd_scripts(
    name: str, warmup: int | float, golden: Callable[[str], Any]
) -> None:
    rows = [
        row
        for row in golden("lr_schedules")["runs"]
        if row["name"] == name
        and not row["opts"].get("lr_scheduler_type")
        and row["opts"].get("lr_warmup_steps", 0) == warmup
    ]
    assert rows
    component = register_schedulers()[name]
    for row in rows:
        if "error" in row:
            assert problems(component(lr_warmup_steps=warmup))
            continue
        used = rates(component(lr_warmup_steps=warmup), plan_for(warmup))
        assert [first for first, _ in used] == pytest.approx(row["lr_group0"], rel=1e-9)
        assert [second for _, second in used] == pytest.approx(row["lr_group1"], rel=1e-9)


@pytest.mark.parametrize(
    ("given", "steps"),
    [("10%", 10), ("0.1", 10), ("10", 10), ("0", 0), ("0.5%", 0), ("2.9%", 2), ("0.99", 99)],
)
def test_warmup_is_steps_share_or_percentage(given: str, steps: int) -> None:
    found: list[Problem] = []
    scheduler = read_warmup(given, found)
    assert found == []
    assert plan_for(scheduler.lr_warmup_steps).warmup == steps


@pytest.mark.parametrize("given", ["-1", "1.5", "120%", "abc", "-10%", "nan", "inf"])
def test_warmup_that_is_neither_is_a_problem(given: str) -> None:
    found: list[Problem] = []
    read_warmup(given, found)
    (problem,) = found
    assert problem.place == "--lr_warmup_steps"
    assert given in problem.message


def test_constant_refuses_the_warmup_it_would_ignore() -> None:
    constant = register_schedulers()["constant"]
    assert problems(constant()) == []
    (problem,) = problems(constant(lr_warmup_steps=10))
    assert "constant_with_warmup" in problem.remedy


def test_warmup_as_long_as_the_run_ends_below_the_full_rate() -> None:
    cosine = register_schedulers()["cosine"]
    used = rates(cosine(), StepPlan(total=10, warmup=10))
    assert [first for first, _ in used] == pytest.approx([1e-4 * step for step in range(10)])


def test_steps_beyond_the_end_keep_the_last_rate() -> None:
    for name in ("linear", "cosine"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = register_schedulers()[name]().build(optimizer, StepPlan(total=5))
        for _ in range(8):
            optimizer.step()
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_options_are_frozen_and_closed() -> None:
    linear = register_schedulers()["linear"]
    with pytest.raises(ValidationError, match="frozen"):
        linear().lr_warmup_steps = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="extra"):
        linear(warmup=5)  # type: ignore[call-arg]


def problems(scheduler: Scheduler) -> list[Problem]:
    config: RunConfig | Any = SimpleNamespace(place=lambda name: f"--{name}")
    return list(scheduler.check(config))


def read_warmup(word: str, found: list[Problem]) -> Scheduler:
    """Read the option as the command line does."""
    setting = Setting(value=Words((word,)), place="--lr_warmup_steps", origin="command line")
    scheduler: Any = validate(register_schedulers()["cosine"], {"lr_warmup_steps": setting}, found)
    read: Scheduler = scheduler
    return read
