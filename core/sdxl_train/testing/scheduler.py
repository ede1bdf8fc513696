"""The contract of learning-rate schedules."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from sdxl_train.components import Scheduler
from sdxl_train.protocols import StepPlan
from sdxl_train.testing.contract import Contract, is_refused, untouched_process
from sdxl_train.testing.state_files import through_a_file

if TYPE_CHECKING:
    from pathlib import Path

    from sdxl_train.testing.state_files import Pair

_RATES = (1e-3, 1e-4)
_WARMUP = 10


class SchedulerContract(Contract[Scheduler]):
    """A factor of the rates by optimizer step: finite, as declared at its end, resumable."""

    num_steps: ClassVar[int] = 60
    """Length of the run that is checked."""
    ends_at: ClassVar[float | None] = None
    """Factor of the rates when the run is over, if the formula states one."""
    highest: ClassVar[float] = 1.0
    """Highest factor."""

    def pair(self, **changes: Any) -> Pair:
        """Build the schedule over an optimizer with two groups."""
        made = self.make(**changes)
        optimizer = torch.optim.SGD(
            [
                {"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate, "name": f"{rate:g}"}
                for rate in _RATES
            ]
        )
        return optimizer, made.build(optimizer, self.steps(made))

    def steps(self, made: Scheduler) -> StepPlan:
        """Count warm-up and decay as a run does."""
        whole = StepPlan(total=self.num_steps)
        return StepPlan(
            total=self.num_steps,
            warmup=whole.count(made.lr_warmup_steps),
            decay=whole.count(made.decay()),
        )

    def factors(self, steps: int, **changes: Any) -> list[tuple[float, ...]]:
        """Give the factor of each group in each step, and after the last one."""
        pair = self.pair(**changes)
        found = [_factors(pair)]
        for _ in range(steps):
            _advance(pair)
            found.append(_factors(pair))
        return found

    def test_factors_are_finite_and_within_bounds(self) -> None:
        """No rate is negative, above ``highest`` or not finite, in the run and after it."""
        for step, factors in enumerate(self.factors(self.num_steps + _WARMUP)):
            for factor in factors:
                assert math.isfinite(factor), f"step {step}: {factor}"
                assert -1e-9 <= factor <= self.highest + 1e-9, f"step {step}: {factor}"

    def test_it_ends_as_declared(self) -> None:
        """When the run is over, the factor is ``ends_at``, where the contract states one."""
        if self.ends_at is None:
            pytest.skip("the contract states no end")
        for factor in self.factors(self.num_steps)[-1]:
            assert factor == pytest.approx(self.ends_at, abs=1e-3)

    def test_all_groups_follow_one_curve(self) -> None:
        """Groups of different rates keep their proportion."""
        for step, (one, two) in enumerate(self.factors(self.num_steps)):
            assert one == pytest.approx(two, rel=1e-6, abs=1e-9), f"step {step}"

    def test_warmup_acts_or_is_refused(self) -> None:
        """With a warm-up the rate rises to its height; a schedule without one refuses it."""
        if self.refusals(lr_warmup_steps=_WARMUP):
            return
        made = self.make(lr_warmup_steps=_WARMUP)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=_RATES[0])
        if is_refused(made.build, optimizer, self.steps(made)):
            return
        # Whether the step after the warm-up is its height or the first to fall is open.
        factors = [first for first, _ in self.factors(_WARMUP - 1, lr_warmup_steps=_WARMUP)]
        assert factors == sorted(factors), f"the rate does not rise in the warm-up: {factors}"
        assert factors[0] < 0.5 * factors[-1], f"the warm-up has no effect: {factors}"

    def test_restored_schedule_goes_on_alike(self, tmp_path: Path) -> None:
        """After a state went through files, the rates are those of a run that never stopped."""
        straight = self.pair()
        for _ in range(self.num_steps // 2):
            _advance(straight)
        resumed = self.pair()
        through_a_file(tmp_path, straight, resumed)
        for step in range(self.num_steps // 2):
            _advance(straight)
            _advance(resumed)
            assert _factors(straight) == _factors(resumed), f"{step} steps after the restart"

    def test_process_is_left_alone(self) -> None:
        """Global generators, default dtype, threads and the like stay as they are."""
        with untouched_process():
            self.factors(self.num_steps)


def _advance(pair: Pair) -> None:
    optimizer, schedule = pair
    optimizer.step()
    schedule.step()


def _factors(pair: Pair) -> tuple[float, ...]:
    return tuple(
        float(group["lr"]) / rate for group, rate in zip(pair[0].param_groups, _RATES, strict=True)
    )
