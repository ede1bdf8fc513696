"""Learning-rate schedules, each a factor of the rate by optimizer step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from sdxl_train import Problem, Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from sdxl_train import RunConfig, StepPlan


def _schedule(
    optimizer: torch.optim.Optimizer, factor: Callable[[int], float]
) -> torch.optim.lr_scheduler.LRScheduler:
    import torch

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _warmed_up(steps: StepPlan, after: Callable[[float], float]) -> Callable[[int], float]:
    """Rise linearly from 0 in ``steps.warmup`` steps, then follow ``after``.

    ``after`` maps the progress of the remaining steps, 0 at their start and 1 at their end.
    """

    def factor(step: int) -> float:
        if step < steps.warmup:
            return step / steps.warmup
        return after(min(1.0, (step - steps.warmup) / max(1, steps.total - steps.warmup)))

    return factor


class Constant(Scheduler):
    """The rate stays as it is."""

    default: ClassVar[bool] = True

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse a warm-up, which this schedule would have to ignore."""
        if self.lr_warmup_steps:
            yield Problem(
                place=config.place("lr_warmup_steps"),
                message=f"{self.lr_warmup_steps} warm-up steps, but constant has no warm-up",
                remedy="use --lr_scheduler constant_with_warmup",
            )

    def build(
        self, optimizer: torch.optim.Optimizer, steps: StepPlan
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the schedule: factor 1."""
        return _schedule(optimizer, lambda step: 1.0)


class ConstantWithWarmup(Scheduler):
    """The rate rises linearly during warm-up, then stays."""

    def build(
        self, optimizer: torch.optim.Optimizer, steps: StepPlan
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the schedule: factor 1 after warm-up."""
        return _schedule(optimizer, _warmed_up(steps, lambda progress: 1.0))


class Linear(Scheduler):
    """The rate falls linearly to 0 at the last step, after warm-up."""

    def build(
        self, optimizer: torch.optim.Optimizer, steps: StepPlan
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the schedule: factor ``1 - progress`` after warm-up."""
        return _schedule(optimizer, _warmed_up(steps, lambda progress: 1.0 - progress))


class Cosine(Scheduler):
    """The rate falls to 0 along half a cosine, after warm-up (Loshchilov & Hutter 2017, eq. 5)."""

    def build(
        self, optimizer: torch.optim.Optimizer, steps: StepPlan
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the schedule: factor ``(1 + cos(pi progress)) / 2`` after warm-up."""
        return _schedule(
            optimizer, _warmed_up(steps, lambda progress: (1 + math.cos(math.pi * progress)) / 2)
        )
