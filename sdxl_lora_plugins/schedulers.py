"""Learning-rate schedules, each a factor of the rate by optimizer step.

The formulas are those of transformers and diffusers, which sd-scripts uses; options that
sd-scripts has as flags are flags here. ``progress`` runs from 0 at the end of warm-up to 1 at the
end of the run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar

from sdxl_train import Field, Problem, Scheduler, StepsOrShare, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from sdxl_train import RunConfig, StepPlan

_NumCycles = Annotated[
    int,
    Field(ge=1, description="Falls of the cosine.", json_schema_extra={"flag": True}),
]
_MinRatio = Annotated[
    float,
    Field(ge=0, le=1, description="Lowest rate, as a share.", json_schema_extra={"flag": True}),
]

_NUMBER = r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*"


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


def _half_cosine(progress: float) -> float:
    """Fall from 1 to 0 along half a cosine; beyond 1, rise and fall on."""
    return (1.0 + math.cos(math.pi * progress)) / 2.0


def _refuse_warmup(scheduler: Scheduler, name: str, config: RunConfig) -> Iterator[Problem]:
    """Refuse a warm-up that the schedule would have to ignore."""
    if scheduler.lr_warmup_steps:
        yield Problem(
            place=config.place("lr_warmup_steps"),
            message=f"{scheduler.lr_warmup_steps} warm-up steps, but {name} has no warm-up",
            remedy="use --lr_scheduler constant_with_warmup",
        )


class Constant(Scheduler):
    """The rate stays as it is."""

    default: ClassVar[bool] = True

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse a warm-up."""
        return _refuse_warmup(self, "constant", config)

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
        return _schedule(optimizer, _warmed_up(steps, _half_cosine))


class CosineWithRestarts(Scheduler):
    """The rate falls to 0 along half a cosine, several times (Loshchilov & Hutter 2017)."""

    lr_scheduler_num_cycles: _NumCycles = 1

    def build(
        self, optimizer: torch.optim.Optimizer, steps: StepPlan
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the schedule: factor of the cosine at the fraction of ``cycles * progress``."""

        def after(progress: float) -> float:
            cycle = self.lr_scheduler_num_cycles * progress
            return 0.0 if progress >= 1.0 else _half_cosine(cycle % 1.0)

        return _schedule(optimizer, _warmed_up(steps, after))


class CosineWithMinLr(Scheduler):
    """The rate falls along half a cosine to a share of itself, after warm-up."""

    lr_scheduler_min_lr_ratio: _MinRatio
    lr_scheduler_num_cycles: _NumCycles = 1

    def build(
        self, optimizer: torch.optim.Optimizer, steps: StepPlan
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the schedule: ``min + (1 - min) (1 + cos(pi cycles progress)) / 2``."""
        low = self.lr_scheduler_min_lr_ratio

        def after(progress: float) -> float:
            return low + (1.0 - low) * _half_cosine(self.lr_scheduler_num_cycles * progress)

        return _schedule(optimizer, _warmed_up(steps, after))


class CosineWarmupWithMinLr(Scheduler):
    """As cosine_with_min_lr, but the warm-up begins above 0 and the last step reaches the end.

    transformers' ``cosine_warmup_with_min_lr``; sd-scripts accepts the name and then crashes.
    """

    lr_scheduler_min_lr_ratio: _MinRatio
    lr_scheduler_num_cycles: _NumCycles = 1
    warmup_lr_rate: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the rate at which warm-up begins. Default: one part of the warm-up.",
    )

    def build(
        self, optimizer: torch.optim.Optimizer, steps: StepPlan
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the schedule."""
        low, start = self.lr_scheduler_min_lr_ratio, self.warmup_lr_rate

        def factor(step: int) -> float:
            if step < steps.warmup:
                if start is None:
                    return (step + 1) / steps.warmup
                return start + (1.0 - start) * step / max(1, steps.warmup - 1)
            progress = min(1.0, (step - steps.warmup + 1) / max(1, steps.total - steps.warmup))
            return low + (1.0 - low) * _half_cosine(self.lr_scheduler_num_cycles * progress)

        return _schedule(optimizer, factor)


class Polynomial(Scheduler):
    """The rate falls to 1e-7 along a power of what remains of the run, after warm-up."""

    lr_scheduler_power: float = Field(
        1.0, gt=0, description="Power of the polynomial.", json_schema_extra={"flag": True}
    )

    def build(
        self, optimizer: torch.optim.Optimizer, steps: StepPlan
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the schedule: ``end + (1 - end) (1 - progress)^power`` after warm-up.

        ``end`` is 1e-7 relative to the largest rate, so that all groups follow one curve.

        Raises:
            UserError: If no rate is above 1e-7.
        """
        highest: float = max(group["lr"] for group in optimizer.param_groups)
        if highest <= 1e-7:
            raise UserError.of(
                "--lr_scheduler polynomial",
                f"falls to 1e-7, and the highest rate is {highest:g}",
                "raise --learning_rate, or use another schedule",
            )
        end = 1e-7 / highest

        def after(progress: float) -> float:
            return end + (1.0 - end) * math.pow(1.0 - progress, self.lr_scheduler_power)

        return _schedule(optimizer, _warmed_up(steps, after))


class InverseSqrt(Scheduler):
    """The rate falls with the inverse square root of the step, after warm-up."""

    lr_scheduler_timescale: int | None = Field(
        None,
        ge=1,
        description="Steps after which it is 1 / sqrt(2). Default: the warm-up, or 10000.",
        json_schema_extra={"flag": True},
    )

    def build(
        self, optimizer: torch.optim.Optimizer, steps: StepPlan
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the schedule: ``sqrt(scale / (scale + step - warmup))`` after warm-up."""
        scale = self.lr_scheduler_timescale or steps.warmup or 10_000

        def factor(step: int) -> float:
            if step < steps.warmup:
                return step / steps.warmup
            return math.sqrt(scale / (scale + step - steps.warmup))

        return _schedule(optimizer, factor)


class WarmupStableDecay(Scheduler):
    """The rate rises, stays, and falls along half a cosine in the last steps (Hu et al. 2024)."""

    lr_decay_steps: StepsOrShare = Field(
        0,
        description="Fall: optimizer steps, a share below 1, or a percentage (10%).",
        json_schema_extra={"flag": True},
    )
    lr_scheduler_min_lr_ratio: _MinRatio = 0.0
    lr_scheduler_num_cycles: _NumCycles = 1

    def decay(self) -> StepsOrShare:
        """Give ``lr_decay_steps``."""
        return self.lr_decay_steps

    def build(
        self, optimizer: torch.optim.Optimizer, steps: StepPlan
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the schedule. Warm-up, too, begins at the lowest rate.

        Raises:
            UserError: If warm-up and decay are longer than the run.
        """
        low, decay = self.lr_scheduler_min_lr_ratio, steps.decay
        if steps.warmup + decay > steps.total:
            raise UserError.of(
                "--lr_warmup_steps, --lr_decay_steps",
                f"{steps.warmup} and {decay} steps in a run of {steps.total}",
                "shorten one of them, or train longer",
            )

        def factor(step: int) -> float:
            if step < steps.warmup:
                return low + (1.0 - low) * step / steps.warmup
            if step < steps.total - decay:
                return 1.0
            if step >= steps.total:
                return low if decay else 1.0
            progress = (step - (steps.total - decay)) / decay
            return low + (1.0 - low) * _half_cosine(self.lr_scheduler_num_cycles * progress)

        return _schedule(optimizer, factor)


class PiecewiseConstant(Scheduler):
    """The rate changes at given steps, as diffusers' ``step_rules`` say."""

    step_rules: str = Field(
        pattern=rf"^({_NUMBER}:\s*[0-9]+\s*,)*{_NUMBER}$",
        description="factor:step, ..., factor: each holds below its step, the last to the end.",
    )

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse a warm-up, and rules out of order."""
        yield from _refuse_warmup(self, "piecewise_constant", config)
        rules, _ = self._rules()
        bounds = [bound for bound, _ in rules]
        if bounds != sorted(set(bounds)):
            yield Problem(
                place=config.place("lr_scheduler_args.step_rules"),
                message=f"the steps {', '.join(map(str, bounds))} do not rise",
                remedy="write for example step_rules=1:500,0.1:800,0.01",
            )

    def build(
        self, optimizer: torch.optim.Optimizer, steps: StepPlan
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the schedule."""
        rules, last = self._rules()

        def factor(step: int) -> float:
            return next((value for bound, value in rules if step < bound), last)

        return _schedule(optimizer, factor)

    def _rules(self) -> tuple[list[tuple[int, float]], float]:
        """Give the factors below each step, and the last one."""
        *parts, last = self.step_rules.split(",")
        rules = [part.split(":") for part in parts]
        return [(int(bound), float(value)) for value, bound in rules], float(last)


class Rex(Scheduler):
    """REX: the rate falls slowly at first and fast at the end (Chen et al. 2022, eq. 3)."""

    def build(
        self, optimizer: torch.optim.Optimizer, steps: StepPlan
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the schedule: ``(1 - progress) / (1/2 + (1 - progress) / 2)`` after warm-up."""
        return _schedule(
            optimizer, _warmed_up(steps, lambda progress: 2 * (1 - progress) / (2 - progress))
        )


class AdafactorRates(Scheduler):
    """The rate that Adafactor sets itself, as sd-scripts calls it; nothing else takes it."""

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse it with what does not set its rate itself."""
        if config.optimizer.brings_schedule() is None:
            yield Problem(
                place=f"{config.place('lr_scheduler')}, {config.place('optimizer_type')}",
                message=f"adafactor shows the rate that Adafactor sets itself with relative_step, "
                f"and the optimizer is {config.name_of('optimizer')}",
                remedy="use --optimizer_type Adafactor, or another schedule",
            )

    def build(
        self, optimizer: torch.optim.Optimizer, steps: StepPlan
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Leave the rate as it is: the optimizer brings its own schedule."""
        return _schedule(optimizer, lambda step: 1.0)
