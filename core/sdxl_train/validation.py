"""The loss on images that are held out of training, with the same noise each time."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sdxl_train.loop import batch_loss
from sdxl_train.rng import Streams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from sdxl_train.config import RunConfig
    from sdxl_train.counts import StepCounts
    from sdxl_train.data.batches import Batch
    from sdxl_train.loop import Step
    from sdxl_train.protocols import LoadedModel

logger = logging.getLogger(__name__)

QUARTILES = 4


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """The loss on the held-out images after a step.

    Attributes:
        step: Optimizer steps done.
        epoch: The epoch of that step, counted from 1.
        loss: Mean over the images and the timesteps, weighted and masked as in training.
        timesteps: One timestep in each quarter of those that are trained, from low to high.
        losses: Mean over the images at each of ``timesteps``; ``loss`` is their mean.
        images: How many images that were.
        due: What made it due: ``step``, ``epoch``, or both.
    """

    step: int
    epoch: int
    loss: float
    timesteps: tuple[int, ...]
    losses: tuple[float, ...]
    images: int
    due: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ValidationResult:
        """Read what :meth:`as_json` gave."""
        loss, losses = values["loss"], values["losses"]
        return cls(
            step=values["step"],
            epoch=values["epoch"],
            loss=math.nan if loss is None else loss,
            timesteps=tuple(values["timesteps"]),
            losses=tuple(math.nan if each is None else each for each in losses),
            images=values["images"],
            due=tuple(values["due"]),
        )

    def as_json(self) -> dict[str, Any]:
        """Give plain JSON values; a loss that is not finite, which JSON cannot write, is None."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "loss": _finite(self.loss),
            "timesteps": list(self.timesteps),
            "losses": [_finite(loss) for loss in self.losses],
            "images": self.images,
            "due": list(self.due),
        }


def best_of(results: Sequence[ValidationResult]) -> ValidationResult | None:
    """Give the first of those with the lowest loss; None if no loss is finite."""
    finite = [result for result in results if math.isfinite(result.loss)]
    return min(finite, key=lambda result: result.loss, default=None)


def patience_is_over(results: Sequence[ValidationResult], patience: int | None) -> bool:
    """Tell whether the newest ``patience`` results in a row are no better than one before them."""
    return (
        patience is not None
        and len(results) > patience
        and best_of(results) not in results[len(results) - patience :]
    )


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Measures the loss on the held-out images.

    The noise depends on the seed, the batch and the timestep only, so that results differ by what
    the network learnt and by nothing else.

    Attributes:
        step: What a training step calls; its timesteps and draws are replaced.
        batches: Gives the held-out batches, the same each time.
        seed: Decides on the noise.
        timesteps: The timesteps at which each batch is measured.
    """

    step: Step
    batches: Callable[[], Iterable[Batch]]
    seed: int
    timesteps: tuple[int, ...]

    def losses(self) -> tuple[tuple[float, ...], int]:
        """Give the mean loss over the images at each timestep, and how many images there were.

        To be called while training stands still (:meth:`.Evaluation.pause`).
        """
        streams = Streams(self.seed, self.step.streams.device)
        steps = [
            replace(self.step, timesteps=_always(timestep), streams=streams)
            for timestep in self.timesteps
        ]
        sums: list[Tensor] = []
        images = 0
        for position, batch in enumerate(self.batches()):
            each = [
                batch_loss(batch, step, (position, timestep)).mean * len(batch)
                for step, timestep in zip(steps, self.timesteps, strict=True)
            ]
            sums.append(torch.stack(each))
            images += len(batch)
        means: list[float] = (torch.stack(sums).sum(dim=0) / images).tolist()
        return tuple(means), images

    def after(self, step: int, epoch: int, due: tuple[str, ...]) -> ValidationResult:
        """Validate the network as it is after ``step``, which is one of ``epoch``."""
        losses, images = self.losses()
        loss = sum(losses) / len(losses)
        logger.info("validation after step %d: loss %.4f", step, loss)
        return ValidationResult(
            step=step,
            epoch=epoch,
            loss=loss,
            timesteps=self.timesteps,
            losses=losses,
            images=images,
            due=due,
        )


def validation_timesteps(config: RunConfig, model: LoadedModel) -> tuple[int, ...]:
    """Give a fifth, two, three and four fifths of the trained range: 200 to 800 of a full one.

    They are sd-scripts' (``linspace(min, max, 6)[1:-1]``), and one lies in each quarter.
    """
    low = config.timesteps.min_timestep
    high = min(config.timesteps.max_timestep or math.inf, model.schedule.num_timesteps)
    span = int(high) - low
    return tuple(low + span * part // (QUARTILES + 1) for part in range(1, QUARTILES + 1))


def validation_due(config: RunConfig, counts: StepCounts, step: int) -> tuple[str, ...]:
    """Tell what asks for validation after ``step``: the ``step`` itself, the ``epoch`` it ends."""
    training = config.training
    every = training.validate_every_n_steps
    by_epoch = training.validate_every_n_epochs
    every_epochs = 1 if by_epoch is None else by_epoch
    epoch = counts.epoch_ended_by(step)
    due = {
        "step": bool(every and step % every == 0),
        "epoch": bool(every_epochs and epoch and epoch % every_epochs == 0),
    }
    return tuple(name for name, is_due in due.items() if is_due)


def _always(timestep: int) -> Any:
    def sample(count: int, generator: torch.Generator) -> Tensor:
        return torch.full((count,), timestep, dtype=torch.int64)

    return sample


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
