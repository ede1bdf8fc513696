"""The training loop: one optimizer step, and the generator that yields them.

Nothing here knows a plugin, a file or a command line. A :class:`Step` holds callables; the loop can
be driven with a list of batches and lambdas.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from sdxl_train.data.batches import Batch, Share
from sdxl_train.errors import TrainingError
from sdxl_train.masks import masked_mean
from sdxl_train.not_finite import Findings, diagnosis
from sdxl_train.rng import seed_global_generators
from sdxl_train.transfer import Fetched, sent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from sdxl_train.protocols import LossFunction, NoiseTransform, TimestepSampler, WeightFunction
    from sdxl_train.rng import Streams


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """The batches of one optimizer step; their number is the gradient accumulation.

    Attributes:
        epoch: The epoch they belong to, counted from 1.
        batches: The batches; of those that several processes share, this one's parts. A bare share
            is that of a batch too small to have a part for this process.
        keys: Short names of the images of whole batches.
    """

    epoch: int
    batches: Sequence[Batch | Share]
    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        step: Optimizer steps done so far, this one included: the first is 1.
        epoch: The epoch it belongs to, counted from 1.
        loss: Mean loss of its samples, fp32 scalar on the device, detached. Reading it waits.
        grad_norm: Norm of all gradients before clipping, fp32 scalar on the device.
        learning_rates: The rate of each optimizer group in this step, by name.
        keys: Short names of the images of this step, one for each sample.
        timesteps: int64 [samples] on the device.
        sample_losses: fp32 [samples] on the device: the loss of each sample, before any weight.
        skipped: The gradient scaler left the weights as they were (fp16 overflow).
        metrics: What else there is to log, by name: tensors without dimensions, on the device or
            the CPU.
    """

    step: int
    epoch: int
    loss: Tensor
    grad_norm: Tensor
    learning_rates: Mapping[str, float]
    keys: tuple[str, ...]
    timesteps: Tensor
    sample_losses: Tensor
    skipped: bool = False
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BatchLoss:
    """The loss of a batch of B samples.

    Attributes:
        mean: What is trained: scalar with its graph, weighted.
        samples: fp32 [B], detached: each sample's own, before any weight. Of a shared batch all are
            here, those of other processes 0.
        timesteps: int64 [B].
    """

    mean: Tensor
    samples: Tensor
    timesteps: Tensor


MAX_SKIPPED_IN_A_ROW = 25
"""A gradient scaler starts at 2**16 and halves at each overflow: more halvings than that find no
scale that fits."""


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
    without_network: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Inside, the model predicts as it would without the network."""
    loss: LossFunction
    weightings: Sequence[WeightFunction] = ()
    streams: Streams
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    backward: Callable[[Tensor], None] = torch.Tensor.backward
    add_up: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple
    """Adds up the gradients of all processes in place, and gives the sums of these tensors."""
    gather: Callable[[Findings], list[Findings]] = lambda findings: [findings]
    """Gives the findings of all processes."""
    clip: Callable[[], Tensor]
    limit_weights: Callable[[], Mapping[str, Tensor]] = dict
    optimizer: Optimizer
    scheduler: LRScheduler
    normalize_masks: bool = False
    """Divide a masked loss by the masked share of the sample."""
    steps_in_backward: bool = False
    """The optimizer steps while gradients come in (see :mod:`.fused`); ``clip`` gives their norm.
    """
    lap: Callable[[str], None] = lambda phase: None
    """Told the name of each phase as it ends: ``data``, ``forward``, ``backward``, ``optimizer``.
    """
    hold_back: Callable[[Tensor], None] | None = None
    """Set where the optimizer can leave a step without effect by itself: told before each one, by a
    bool [] on the device, whether the gradients are finite."""
    was_skipped: Callable[[], bool] | None = None
    """Set where a gradient scaler is at work: it skips steps whose gradients are not finite."""
    updating: bool = field(default=False, init=False)
    """The update has begun and not ended: weights, optimizer and schedule do not belong together.
    """


def train(steps: Iterable[StepBatches], step: Step, *, start: int = 0) -> Iterator[StepResult]:
    """Train, yielding after each optimizer step.

    Args:
        steps: The batches of each step to come.
        step: What to call.
        start: Optimizer steps done before; the draws of a step depend on its number only.

    Raises:
        TrainingError: If a loss or gradient is not finite. The weights are still those of the
            step before, unless ``step.updating`` says otherwise.
    """
    skipped_in_a_row = 0
    for taken in _steps(steps, step, start):
        skipped_in_a_row = skipped_in_a_row + 1 if taken.skipped else 0
        if skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"step {taken.step}: the last {skipped_in_a_row} steps were all skipped, because "
                f"their gradients overflow fp16 at any scale: nothing trains. Use "
                f"--mixed_precision bf16, or a lower learning rate"
            )
        yield taken


def _steps(steps: Iterable[StepBatches], step: Step, start: int) -> Iterator[StepResult]:
    """Take the steps, each known to be finite when it is given.

    Where the optimizer can hold an update back by itself, that is asked for only when the gradients
    of the next step are queued, so that the device has work while the answer is on its way.
    """
    late: _Taken | None = None
    numbered = enumerate(steps, start=start + 1)
    while True:
        try:
            gradients = _gradients(numbered, step)
        except Exception:
            if late is not None:  # the failure is of the next step
                yield late.confirmed()
            raise
        if late is not None:
            yield late.confirmed()
        if gradients is None:
            return
        taken = _Taken(gradients, step)
        late = taken if step.hold_back else None
        if late is None:
            yield taken.confirmed()


@dataclass(frozen=True, kw_only=True)
class _Gradients:
    """A step whose gradients are there, and nothing else yet."""

    number: int
    group: StepBatches
    parts: Sequence[BatchLoss]


def _gradients(numbered: Iterator[tuple[int, StepBatches]], step: Step) -> _Gradients | None:
    """Compute the gradients of the next step; None if there is none."""
    number, group = next(numbered, (0, None))
    if group is None:
        return None
    step.lap("data")
    return _Gradients(number=number, group=group, parts=list(_backward(group, step, number)))


class _Taken:
    """A step that is taken, or held back by its optimizer.

    Raises:
        TrainingError: If it is not finite, and the optimizer could not hold it back.
    """

    def __init__(self, gradients: _Gradients, step: Step) -> None:
        self._gradients = gradients
        self._step = step
        parts = gradients.parts
        rates = {group["name"]: float(group["lr"]) for group in step.optimizer.param_groups}
        means = torch.stack([part.mean for part in parts])
        self._losses, samples = step.add_up([means, torch.cat([part.samples for part in parts])])
        self._grad_norm = step.clip()
        total = self._losses.sum()
        if step.was_skipped is None:
            total = total + self._grad_norm
        finite = torch.isfinite(total)
        self._finite = Fetched(finite)
        if step.hold_back:
            step.hold_back(finite)
        else:
            self._require_finite()
        # Some optimizers draw, from global generators; each process has to draw the same.
        seed_global_generators(step.streams.seed_for("update", gradients.number))
        step.updating = True
        step.optimizer.step()
        self._skipped = step.was_skipped is not None and step.was_skipped()
        estimates = _estimated_rates(step.optimizer)
        if not (self._skipped or step.hold_back):
            step.scheduler.step()
        metrics = {**estimates, **step.limit_weights()}
        step.updating = False
        step.optimizer.zero_grad(set_to_none=True)
        step.lap("optimizer")
        self._result = StepResult(
            step=gradients.number,
            epoch=gradients.group.epoch,
            loss=self._losses.mean(),
            grad_norm=self._grad_norm,
            learning_rates=rates,
            keys=gradients.group.keys,
            timesteps=torch.cat([part.timesteps for part in parts]),
            sample_losses=samples,
            skipped=self._skipped,
            metrics=metrics,
        )

    def confirmed(self) -> StepResult:
        """Give the result, once it is known that the step is finite.

        Raises:
            TrainingError: If it is not: it was held back.
        """
        if self._step.hold_back:
            self._require_finite()
            self._step.scheduler.step()
        return self._result

    def _require_finite(self) -> None:
        gradients = self._gradients
        if not self._finite.value():
            _raise_not_finite(
                self._losses,
                self._grad_norm,
                gradients.number,
                gradients.group,
                gradients.parts,
                self._step,
            )


def _estimated_rates(optimizer: Optimizer) -> dict[str, Tensor]:
    """Give the rates in effect of an optimizer that finds its own, under sd-scripts' names.

    D-Adaptation and Prodigy keep their estimate, which multiplies the rate, as ``d`` of a group.
    """
    return {
        f"lr/d*lr/{group['name']}": torch.as_tensor(group["d"] * group["lr"])
        for group in optimizer.param_groups
        if "d" in group
    }


def _backward(group: StepBatches, step: Step, number: int) -> Iterator[BatchLoss]:
    """Compute the gradients of a step, and give the loss of each of its batches."""
    for position, batch in enumerate(group.batches):
        where = (number, position)
        if isinstance(batch, Share):
            yield _no_loss(batch, step, where)
            continue
        loss = batch_loss(batch, step, where)
        step.lap("forward")
        detached = replace(loss, mean=loss.mean.detach())
        if step.steps_in_backward:
            if not torch.isfinite(detached.mean):
                alone = replace(group, batches=[batch])
                _raise_not_finite(detached.mean[None], None, number, alone, [detached], step)
            step.updating = True
        step.backward(loss.mean / len(group.batches))
        step.lap("backward")
        yield detached


def _no_loss(share: Share, step: Step, where: tuple[int, int]) -> BatchLoss:
    """Give what a process that has none of a batch contributes to its loss."""
    timesteps = step.timesteps(share.whole, step.streams.cpu("timesteps", *where))
    zeros = torch.zeros(share.whole + 1, device=step.streams.device)
    return BatchLoss(mean=zeros[0], samples=zeros[1:], timesteps=timesteps.to(zeros.device))


def batch_loss(batch: Batch, step: Step, where: tuple[int, int]) -> BatchLoss:
    """Give the loss of one batch.

    What a process has of a shared batch gets the draws that it would get in the whole one, and its
    share of the mean: the losses of all processes add up to that of the batch.

    Args:
        batch: Must hold latents [B, C, h, w].
        step: What to call.
        where: Optimizer step and position in it; the draws derive from it.
    """
    latents = batch.latents
    assert latents is not None
    device = latents.device
    share = batch.share or Share(first=0, whole=len(latents), latents=latents)
    own = slice(share.first, share.first + len(latents))
    drawn = sent(step.timesteps(share.whole, step.streams.cpu("timesteps", *where)), device)
    timesteps = drawn[own]
    noise, input_noise = _draw_noise(share, drawn, latents.shape[1:], step, where)
    noise, input_noise = noise[own], input_noise[own]
    noisy = step.add_noise(latents, input_noise, timesteps)
    target = step.target(latents, noise, timesteps)

    step.prepare_step(timesteps)
    if batch.preserved is not None:
        # First: a model that reuses its memory makes no prediction before a backward pass.
        with torch.no_grad(), step.without_network(), step.autocast():
            bare = step.predict(noisy, timesteps, step.condition(batch))
        target = torch.where(batch.preserved[:, None, None, None], bare.float(), target.float())
    # Dropout layers know only global generators.
    seed_global_generators(step.streams.seed_for("dropout", *where, share.first))
    with step.autocast():
        prediction = step.predict(noisy, timesteps, step.condition(batch))

    error = step.loss(prediction.float(), target.float(), timesteps)  # [B, C, h, w]
    if batch.masks is None:
        each = error.mean(dim=(1, 2, 3))  # [B]
    else:
        each = masked_mean(error, batch.masks, normalize=step.normalize_masks)  # [B]
    samples = torch.zeros(share.whole, device=device)
    if share.idle:
        each = each * 0
    samples[own] = each.detach()
    for weight in step.weightings:
        each = each * weight(drawn)[own]
    mean = (each * batch.loss_weights).sum() / share.whole
    return BatchLoss(mean=mean, samples=samples, timesteps=drawn)


def _draw_noise(
    share: Share, timesteps: Tensor, shape: torch.Size, step: Step, where: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Draw the noises of a whole batch, the one to predict and the one to add: [whole, C, h, w]."""
    generator = step.streams.on_device("noise", *where)
    noise = torch.randn((share.whole, *shape), generator=generator, device=timesteps.device)
    if not (step.target_noises or step.input_noises):
        return noise, noise
    assert share.latents is not None, "noises look at the latents of the whole batch"
    for transform in step.target_noises:
        noise = transform(noise, share.latents, timesteps, generator)
    input_noise = noise
    for transform in step.input_noises:
        input_noise = transform(input_noise, share.latents, timesteps, generator)
    return noise, input_noise


def _raise_not_finite(
    losses: Tensor,
    grad_norm: Tensor | None,
    number: int,
    group: StepBatches,
    parts: Sequence[BatchLoss],
    step: Step,
) -> NoReturn:
    """Raise TrainingError, with the images of all processes."""
    outcome = "the step was not applied"
    if step.updating:
        outcome = "the run ends with parts of the step applied; go on from a saved state"
    findings = step.gather(Findings.of(parts, group))
    raise TrainingError(diagnosis(losses, grad_norm, number, group, findings, outcome))
