"""How long a run is and what falls due at which step. No torch: the plan and the run share it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_train.components import StepPlan

if TYPE_CHECKING:
    from sdxl_train.config import OutputOptions, TrainingOptions

DEFAULT_MAX_STEPS = 1600
"""sd-scripts' default, where neither steps nor epochs are given."""


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """The lengths of a run.

    Attributes:
        batches_per_epoch: Batches that one pass over the data gives.
        steps_per_epoch: Optimizer steps of an epoch; the last may accumulate fewer batches.
        epochs: Epochs begun.
        total: Optimizer steps in all.
        warmup: Optimizer steps of warm-up.
        decay: Optimizer steps of decay at the end.
    """

    batches_per_epoch: int
    steps_per_epoch: int
    epochs: int
    total: int
    warmup: int
    decay: int = 0

    @classmethod
    def of(
        cls,
        training: TrainingOptions,
        batches_per_epoch: int,
        *,
        warmup: float | int,
        decay: float | int = 0,
    ) -> StepCounts:
        """Count for these options; warm-up and decay are numbers of steps, or shares below 1."""
        per_epoch = math.ceil(batches_per_epoch / training.gradient_accumulation_steps)
        if training.max_train_epochs is not None:
            total = training.max_train_epochs * per_epoch
        else:
            total = training.max_train_steps or DEFAULT_MAX_STEPS
        return cls(
            batches_per_epoch=batches_per_epoch,
            steps_per_epoch=per_epoch,
            epochs=math.ceil(total / per_epoch),
            total=total,
            warmup=StepPlan(total=total).count(warmup),
            decay=StepPlan(total=total).count(decay),
        )

    @property
    def step_plan(self) -> StepPlan:
        """What a scheduler is told."""
        return StepPlan(total=self.total, warmup=self.warmup, decay=self.decay)


@dataclass(frozen=True, kw_only=True)
class SavePoint:
    """A file that falls due after a step.

    Attributes:
        kind: ``epoch``, ``step`` or ``final``.
        number: The epoch or step in the file's name.
    """

    kind: str
    number: int


@dataclass(frozen=True, kw_only=True)
class SaveSchedule:
    """When the network is saved during a run."""

    every_n_epochs: int | None
    every_n_steps: int | None
    counts: StepCounts

    @classmethod
    def of(cls, output: OutputOptions, counts: StepCounts) -> SaveSchedule:
        """Read the saving options; ``save_n_epoch_ratio`` stands for a number of epochs."""
        every = output.save_every_n_epochs
        if output.save_n_epoch_ratio is not None:
            every = max(1, counts.epochs // output.save_n_epoch_ratio)
        return cls(every_n_epochs=every, every_n_steps=output.save_every_n_steps, counts=counts)

    def due(self, step: int) -> list[SavePoint]:
        """Give what to save after ``step``. The last epoch has no file: the final one is it."""
        points = []
        if self.every_n_steps and step % self.every_n_steps == 0:
            points.append(SavePoint(kind="step", number=step))
        epoch, rest = divmod(step, self.counts.steps_per_epoch)
        ends_epoch = rest == 0 and epoch < self.counts.epochs
        if self.every_n_epochs and ends_epoch and epoch % self.every_n_epochs == 0:
            points.append(SavePoint(kind="epoch", number=epoch))
        if step == self.counts.total:
            points.append(SavePoint(kind="final", number=step))
        return points

    def steps(self) -> list[int]:
        """Give every step after which something is saved."""
        return [step for step in range(1, self.counts.total + 1) if self.due(step)]
