"""The training loop: one optimizer step, and the generator that yields them.

Nothing here knows a plugin, a file or a command line. A :class:`Step` holds callables; the loop can
be driven with a list of batches and lambdas.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sdxl_train.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from sdxl_train.components import (
        LossFunction,
        NoiseTransform,
        TimestepSampler,
        WeightFunction,
    )
    from sdxl_train.data.batches import Batch
    from sdxl_train.rng import Streams


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """The batches of one optimizer step; their number is the gradient accumulation."""

    epoch: int
    batches: Sequence[Batch]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        step: Optimizer steps done so far, this one included: the first is 1.
        epoch: The epoch it belongs to, counted from 1.
        loss: Mean loss of its samples, fp32 scalar on the device, detached. Reading it waits.
        grad_norm: Norm of all gradients before clipping, fp32 scalar on the device.
        learning_rates: The rate of each optimizer group in this step, by name.
        keys: Short names of the images of this step.
    """

    step: int
    epoch: int
    loss: Tensor
    grad_norm: Tensor
    learning_rates: Mapping[str, float]
    keys: tuple[str, ...]


@dataclass(kw_only=True)
class Step:
    """Everything that one optimizer step calls, built from the chosen components."""

    timesteps: TimestepSampler
    target_noises: Sequence[NoiseTransform] = ()
    input_noises: Sequence[NoiseTransform] = ()
    add_noise: Callable[[Tensor, Tensor, Tensor], Tensor]
    condition: Callable[[Batch], Mapping[str, Tensor]]
    prepare_step: Callable[[Tensor], None]
    predict: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    target: Callable[[Tensor, Tensor, Tensor], Tensor]
    loss: LossFunction
    weightings: Sequence[WeightFunction] = ()
    streams: Streams
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    backward: Callable[[Tensor], None] = torch.Tensor.backward
    clip: Callable[[], Tensor]
    optimizer: Optimizer
    scheduler: LRScheduler
    tolerates_overflow: bool = field(default=False)
    """A gradient scaler is at work: it skips steps whose gradients are not finite."""


def train(steps: Iterable[StepBatches], step: Step, *, start: int = 0) -> Iterator[StepResult]:
    """Train, yielding after each optimizer step.

    Args:
        steps: The batches of each step to come.
        step: What to call.
        start: Optimizer steps done before; the draws of a step depend on its number only.

    Raises:
        TrainingError: If a loss or gradient is not finite. The weights are still those of the
            step before.
    """
    for number, group in enumerate(steps, start=start + 1):
        losses = []
        for position, batch in enumerate(group.batches):
            loss = batch_loss(batch, step, (number, position))
            step.backward(loss / len(group.batches))
            losses.append(loss.detach())
        loss, grad_norm = torch.stack(losses).mean(), step.clip()
        keys = tuple(key for batch in group.batches for key in batch.keys)
        _require_finite(loss, grad_norm, number, keys, step)
        rates = {group["name"]: float(group["lr"]) for group in step.optimizer.param_groups}
        step.optimizer.step()
        step.scheduler.step()
        step.optimizer.zero_grad(set_to_none=True)
        yield StepResult(
            step=number,
            epoch=group.epoch,
            loss=loss,
            grad_norm=grad_norm,
            learning_rates=rates,
            keys=keys,
        )


def batch_loss(batch: Batch, step: Step, where: tuple[int, int]) -> Tensor:
    """Give the loss of one batch, a scalar with its graph.

    Args:
        batch: Must hold latents [B, C, h, w].
        step: What to call.
        where: Optimizer step and position in it; the draws derive from it.
    """
    latents = batch.latents
    assert latents is not None
    device = latents.device
    timesteps = step.timesteps(len(latents), step.streams.cpu("timesteps", *where)).to(device)
    generator = step.streams.on_device("noise", *where)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    for transform in step.target_noises:
        noise = transform(noise, latents, timesteps, generator)
    input_noise = noise
    for transform in step.input_noises:
        input_noise = transform(input_noise, latents, timesteps, generator)
    noisy = step.add_noise(latents, input_noise, timesteps)

    # Dropout layers know only the global generator.
    torch.manual_seed(step.streams.seed_for("dropout", *where))
    step.prepare_step(timesteps)
    with step.autocast():
        prediction = step.predict(noisy, timesteps, step.condition(batch))
    target = step.target(latents, noise, timesteps)

    error = step.loss(prediction.float(), target.float(), timesteps)  # [B, C, h, w]
    each = error.mean(dim=(1, 2, 3))  # [B]
    for weight in step.weightings:
        each = each * weight(timesteps)
    return (each * batch.loss_weights).mean()


def _require_finite(
    loss: Tensor, grad_norm: Tensor, number: int, keys: Sequence[str], step: Step
) -> None:
    suspect = loss if step.tolerates_overflow else loss + grad_norm
    if torch.isfinite(suspect):
        return
    what = "loss" if not torch.isfinite(loss) else "gradient"
    raise TrainingError(
        f"step {number}: the {what} is not finite (loss {loss.item()}, gradient norm "
        f"{grad_norm.item()}), so the step was not applied. Images: {', '.join(keys[:8])}. "
        f"Likely causes: a learning rate that is too high, or an image or VAE that gives NaN."
    )
