"""Every learning-rate schedule against sd-scripts' rates, transformers and diffusers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers.optimization import get_piecewise_constant_schedule
from pydantic import ValidationError
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from sdxl_lora_plugins import register_schedulers
from sdxl_train import LibraryScheduler, StepPlan, UserError
from sdxl_train.options import Setting, Words, validate

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdxl_train import Problem, RunConfig, Scheduler

SCHEDULERS: dict[str, Any] = dict(register_schedulers())
RATES = (1e-3, 1e-4)


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    )


def rates(
    build: Callable[[torch.optim.Optimizer], Any], steps: int = 100
) -> tuple[list[float], ...]:
    """Give the rate of each group at each step."""
    over = optimizer(*RATES)
    schedule = build(over)
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in over.param_groups])
        over.step()
        schedule.step()
    return tuple(list(group) for group in zip(*used, strict=True))


def plan_of(component: Scheduler, total: int) -> StepPlan:
    whole = StepPlan(total=total)
    return StepPlan(
        total=total,
        warmup=whole.count(component.lr_warmup_steps),
        decay=whole.count(component.decay()),
    )


def factors(name: str, total: int = 100, **options: Any) -> list[float]:
    component = SCHEDULERS[name](**options)
    plan = plan_of(component, total)
    first, _ = rates(lambda over: component.build(over, plan), total)
    return [rate / RATES[0] for rate in first]


def problems(scheduler: Any) -> list[Problem]:
    config: RunConfig | Any = SimpleNamespace(place=lambda name: f"--{name}")
    return list(scheduler.check(config))


WITHOUT_GOLDEN_CURVE = {
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "piecewise_constant",
    "rex",
    "adafactor",
}
"""What sd-scripts does not have, or refused or crashed on where the numbers were taken."""


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - WITHOUT_GOLDEN_CURVE))
def test_rates_equal_every_golden_curve(name: str, golden: Callable[[str], Any]) -> None:
    compared = 0
    for row in golden("lr_schedules")["runs"]:
        if row["name"] != name or "error" in row or "lr_scheduler_type" in row["opts"]:
            continue
        # sd-scripts passes over options of other schedules, which a run here refuses.
        own = {k: v for k, v in row["opts"].items() if k in SCHEDULERS[name].model_fields}
        component = SCHEDULERS[name](**own)
        plan = plan_of(component, 100)
        first, second = rates(lambda over, c=component, p=plan: c.build(over, p))  # type: ignore[misc]
        assert first == pytest.approx(row["lr_group0"], rel=1e-9, abs=1e-15)
        assert second == pytest.approx(row["lr_group1"], rel=1e-9, abs=1e-15)
        compared += 1
    assert compared >= 1


def test_rates_of_classes_equal_their_golden_curves(golden: Callable[[str], Any]) -> None:
    compared = 0
    for row in golden("lr_schedules")["runs"]:
        if "lr_scheduler_type" not in row["opts"] or "error" in row:
            continue
        path = f"torch.optim.lr_scheduler.{row['opts']['lr_scheduler_type']}"
        pairs = (pair.split("=") for pair in row["opts"]["lr_scheduler_args"])
        # Without the length of the run, which a run hands over.
        given = {name: float(value) for name, value in pairs if float(value) != 100}
        component = LibraryScheduler.of(path).resolved()(**given)
        first, second = rates(lambda over, c=component: c.build(over, StepPlan(total=100)))  # type: ignore[misc]
        assert first == pytest.approx(row["lr_group0"], rel=1e-6, abs=1e-12)
        assert second == pytest.approx(row["lr_group1"], rel=1e-6, abs=1e-12)
        compared += 1
    assert compared == 2


@pytest.mark.parametrize("form", ["10%", "0.1", "10"])
def test_warmup_and_decay_are_counts_shares_or_percent(form: str) -> None:
    given = {
        name: Setting(value=Words((form,)), place=name, origin="command line")
        for name in ("lr_warmup_steps", "lr_decay_steps")
    }
    faults: list[Problem] = []
    component: Any = validate(SCHEDULERS["warmup_stable_decay"], given, faults)
    assert faults == []
    assert plan_of(component, 100) == StepPlan(total=100, warmup=10, decay=10)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("linear", {"lr_warmup_steps": 10}, [0, 0.1, 0.5, 1, 0.5556, 0.0111]),
        (
            "cosine_with_restarts",
            {"lr_scheduler_num_cycles": 3},
            [1, 0.9978, 0.9455, 0.7939, 0.5, 0.0022],
        ),
        ("inverse_sqrt", {"lr_warmup_steps": 10}, [0, 0.1, 0.5, 1, 0.4472, 0.3178]),
        (
            "cosine_with_min_lr",
            {"lr_scheduler_min_lr_ratio": 0.1},
            [1, 0.9998, 0.9945, 0.978, 0.55, 0.1002],
        ),
        (
            "warmup_stable_decay",
            {"lr_warmup_steps": 0.1, "lr_decay_steps": 0.2, "lr_scheduler_min_lr_ratio": 0.1},
            [0.1, 0.19, 0.55, 1, 1, 0.1055],
        ),
        (
            "piecewise_constant",
            {"step_rules": "1:10,0.1:20,0.01:30,0.005"},
            [1, 1, 1, 0.1, 0.005, 0.005],
        ),
    ],
)
def test_factors_equal_the_known_ones(
    name: str, options: dict[str, Any], expected: list[float]
) -> None:
    found = factors(name, **options)
    assert [found[step] for step in (0, 1, 5, 10, 50, 99)] == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("start", [None, 0.2])
def test_cosine_warmup_with_min_lr_equals_that_of_transformers(start: float | None) -> None:
    found = factors(
        "cosine_warmup_with_min_lr",
        lr_warmup_steps=10,
        lr_scheduler_min_lr_ratio=0.1,
        lr_scheduler_num_cycles=1,
        warmup_lr_rate=start,
    )
    first, _ = rates(
        lambda over: get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            over, 10, 100, num_cycles=0.5, min_lr_rate=0.1, warmup_lr_rate=start
        )
    )
    assert found == pytest.approx([rate / RATES[0] for rate in first])


def test_piecewise_constant_equals_that_of_diffusers() -> None:
    rules = "0.5:3,2e-1:7,1:50,0.25"
    first, _ = rates(lambda over: get_piecewise_constant_schedule(over, rules))
    found = factors("piecewise_constant", step_rules=f" {rules} ")
    assert found == pytest.approx([rate / RATES[0] for rate in first])


def test_rex_follows_its_formula() -> None:
    expected = [(1 - p) / (0.5 + 0.5 * (1 - p)) for p in (step / 90 for step in range(90))]
    assert factors("rex", lr_warmup_steps=10)[10:] == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_rates_stay_where_the_run_ends(name: str) -> None:
    needed: dict[str, dict[str, Any]] = {
        "cosine_with_min_lr": {"lr_scheduler_min_lr_ratio": 0.1},
        "cosine_warmup_with_min_lr": {"lr_scheduler_min_lr_ratio": 0.1},
        "piecewise_constant": {"step_rules": "1:2,0.5"},
        "warmup_stable_decay": {"lr_decay_steps": 3},
    }
    over = optimizer(1.0)
    component = SCHEDULERS[name](**needed.get(name, {}))
    schedule = component.build(over, StepPlan(total=5, warmup=2))
    found = []
    for _ in range(8):
        over.step()
        schedule.step()
        found.append(over.param_groups[0]["lr"])
    assert all(0 <= rate <= 1 for rate in found)
    if name != "inverse_sqrt":
        assert found[4:] == pytest.approx([found[4]] * 4, abs=1e-12)


@pytest.mark.parametrize("warmup", [10, 0.1])
@pytest.mark.parametrize(
    ("name", "options"), [("constant", {}), ("piecewise_constant", {"step_rules": "1:5,0.1"})]
)
def test_schedules_without_warmup_refuse_one(
    name: str, options: dict[str, Any], warmup: float
) -> None:
    assert problems(SCHEDULERS[name](**options)) == []
    (problem,) = problems(SCHEDULERS[name](lr_warmup_steps=warmup, **options))
    assert problem.place == "--lr_warmup_steps"
    assert name in problem.message


@pytest.mark.parametrize("rules", ["", "1:10", "a:1,2", "1:10,0.1:x,1", "1:10,,1", "1e:5,1"])
def test_step_rules_that_are_none_are_refused(rules: str) -> None:
    with pytest.raises(ValidationError):
        SCHEDULERS["piecewise_constant"](step_rules=rules)


def test_step_rules_out_of_order_are_refused() -> None:
    (problem,) = problems(SCHEDULERS["piecewise_constant"](step_rules="1:20,0.5:10,0.1"))
    assert "20, 10" in problem.message


def test_minimum_is_required_where_it_is_the_point() -> None:
    with pytest.raises(ValidationError, match="lr_scheduler_min_lr_ratio"):
        SCHEDULERS["cosine_with_min_lr"]()


def test_warmup_and_decay_longer_than_the_run_are_refused() -> None:
    decay = SCHEDULERS["warmup_stable_decay"](lr_decay_steps=0.9)
    with pytest.raises(UserError, match=r"lr_warmup_steps, --lr_decay_steps.*20 and 90 steps"):
        decay.build(optimizer(1e-3), StepPlan(total=100, warmup=20, decay=90))


def test_polynomial_refuses_rates_below_its_end() -> None:
    with pytest.raises(UserError, match="1e-7"):
        SCHEDULERS["polynomial"]().build(optimizer(1e-8), StepPlan(total=10))
