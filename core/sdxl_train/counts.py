"""How long a run is and what falls due at which step. No torch: the plan and the run share it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdxl_train.protocols import StepPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

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

    def epoch_ended_by(self, step: int) -> int | None:
        """Give the epoch that ends with ``step``; the last one ends with the run."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        if step == self.total:
            return self.epochs
        return epoch if rest == 0 and step else None

    @property
    def step_plan(self) -> StepPlan:
        """What a scheduler is told."""
        return StepPlan(total=self.total, warmup=self.warmup, decay=self.decay)


@dataclass(frozen=True, kw_only=True)
class SavePoint:
    """What falls due after a step.

    Attributes:
        kind: ``epoch``, ``step``, ``best`` or ``final``.
        number: The epoch or step in the file's name.
        network: Whether the network is saved.
        state: Whether what ``--resume`` needs is saved.
    """

    kind: str
    number: int
    network: bool = True
    state: bool = False


def with_state(points: Sequence[SavePoint], step: int) -> list[SavePoint]:
    """Give ``points`` such that a state is saved after ``step``, with a network beside it."""
    if not points:
        return [SavePoint(kind="step", number=step, state=True)]
    if any(point.state for point in points):
        return list(points)
    return [*points[:-1], replace(points[-1], state=True)]


@dataclass(frozen=True, kw_only=True)
class _Rhythm:
    """Every how many epochs and steps something is saved."""

    epochs: int | None
    steps: int | None

    def due(self, kind: str, number: int) -> bool:
        every = self.epochs if kind == "epoch" else self.steps
        return every is not None and number % every == 0


@dataclass(frozen=True, kw_only=True)
class SaveSchedule:
    """When the network and the state are saved during a run.

    Attributes:
        networks: The rhythm of the networks.
        states: The rhythm of the states that are not saved with a network.
        state_with_network: With each network goes a state.
        state_at_end: A state is saved at the end.
        counts: The lengths of the run.
    """

    networks: _Rhythm
    states: _Rhythm
    state_with_network: bool
    state_at_end: bool
    counts: StepCounts

    @classmethod
    def of(cls, output: OutputOptions, counts: StepCounts) -> SaveSchedule:
        """Read the saving options; ``save_n_epoch_ratio`` stands for a number of epochs."""
        every = output.save_every_n_epochs
        if output.save_n_epoch_ratio is not None:
            every = max(1, counts.epochs // output.save_n_epoch_ratio)
        states = _Rhythm(
            epochs=output.save_state_every_n_epochs, steps=output.save_state_every_n_steps
        )
        return cls(
            networks=_Rhythm(epochs=every, steps=output.save_every_n_steps),
            states=states,
            state_with_network=output.save_state,
            state_at_end=output.save_state or output.save_state_on_train_end,
            counts=counts,
        )

    def due(self, step: int) -> list[SavePoint]:
        """Give what to save after ``step``. The last epoch has no file: the final one is it."""
        points = [self._point("step", step)]
        epoch = self.counts.epoch_ended_by(step)
        if epoch and epoch < self.counts.epochs:
            points.append(self._point("epoch", epoch))
        if step == self.counts.total:
            points.append(SavePoint(kind="final", number=step, state=self.state_at_end))
        return [point for point in points if point.network or point.state]

    def _point(self, kind: str, number: int) -> SavePoint:
        network = self.networks.due(kind, number)
        return SavePoint(
            kind=kind,
            number=number,
            network=network,
            state=(network and self.state_with_network) or self.states.due(kind, number),
        )

    def steps(self) -> list[int]:
        """Give every step after which something is saved."""
        return [step for step in range(1, self.counts.total + 1) if self.due(step)]
