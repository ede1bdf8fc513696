"""The plan of an epoch: which samples make which batch, in which order.

A sample is one of the repeats of an image. Batches hold samples of one dataset and one bucket.
Everything random about a sample (its place, its mirroring, its caption) depends on the seed, the
epoch and the sample alone: not on worker processes, caches, or where the run was resumed.
"""

from __future__ import annotations

import random
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from sdxl_train.data.captions import process_caption
from sdxl_train.data.views import draw_colour, drawn_fit
from sdxl_train.rng import derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import Tensor

    from sdxl_train.data.buckets import Fit, Size
    from sdxl_train.data.records import Dataset
    from sdxl_train.data.views import Colour


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One of the repeats of an image.

    Attributes:
        image: Index of the image in its dataset.
        repeat: Which repeat it is, from 0.
        flipped: Whether it is mirrored from left to right.
        fit: Where it is cut out this time; None: as always.
        colour: How its colour changes this time.
    """

    image: int
    repeat: int
    flipped: bool = False
    fit: Fit | None = None
    colour: Colour | None = None


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Share:
    """The part of a batch that this process has, the rest being with others.

    Attributes:
        first: Number of its first sample in the whole batch.
        whole: Samples of the whole batch.
        latents: fp32 [whole, C, h, w], where noises look at them; else None.
        idle: There is none for this process, which computes another's sample beside it: the others
            need its part of the weights meanwhile.
    """

    first: int
    whole: int
    latents: Tensor | None = None
    idle: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSpec:
    """What a batch holds.

    Attributes:
        dataset: Index of the dataset.
        bucket: Training size of all its samples.
        epoch: The epoch, counted from 1.
        samples: The samples; if the batch is shared, those of this process.
        step: Optimizer steps done before it is trained.
        share: Which part of a shared batch they are.
    """

    dataset: int
    bucket: Size
    epoch: int
    samples: tuple[Sample, ...]
    step: int = 0
    share: Share | None = None

    def part(self, index: int, count: int) -> BatchSpec:
        """Give the part of process ``index`` among ``count``: parts differ by a sample at most."""
        whole = len(self.samples)
        first, last = index * whole // count, (index + 1) * whole // count
        share = Share(first=first, whole=whole)
        return replace(self, samples=self.samples[first:last], share=share)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The tensors of a batch of B samples.

    Attributes:
        pixels: fp32 [B, 3, H, W] in [-1, 1]; None if the latents are cached.
        latents: fp32 [B, C, H/s, W/s], scaled for training; None if they are not cached.
        captions: The captions to train with.
        text: What the text encoders make of them, the batch first; None if it is not cached.
        original_size: int64 [B, 2], (height, width) of the images, upright.
        crop_top_left: int64 [B, 2], (top, left) of the crop in the resized image.
        target_size: int64 [B, 2], (height, width) of the bucket.
        loss_weights: fp32 [B].
        masks: fp32 [B, 1, H, W] in [0, 1], the weights of pixels, or smaller, of the latents; None
            if no image of the batch has a mask.
        keys: Short names of the images, for messages.
        preserved: bool [B], whose target is what the model predicts without the network; None if
            nobody's is.
        share: Which part of a batch this is; None: all of it.
    """

    pixels: Tensor | None
    latents: Tensor | None
    captions: list[str]
    text: dict[str, Tensor] | None
    original_size: Tensor
    crop_top_left: Tensor
    target_size: Tensor
    loss_weights: Tensor
    keys: list[str]
    masks: Tensor | None = None
    preserved: Tensor | None = None
    share: Share | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device, *, pinned: bool = True) -> Batch:
        """Give the same batch with its tensors on ``device``.

        Args:
            device: Where to.
            pinned: Let a GPU fetch them by itself, so that nobody waits.
        """
        from sdxl_train.transfer import sent

        moved: dict[str, object] = {}
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name == "text" and value is not None:
                moved[name] = {k: sent(v, device, pinned=pinned) for k, v in value.items()}
            elif value is not None and name not in ("captions", "keys", "share"):
                moved[name] = sent(value, device, pinned=pinned)
        return replace(self, **moved)  # type: ignore[arg-type]


def count_batches(datasets: Sequence[Dataset], processes: int = 1) -> int:
    """Count the batches of an epoch, the same in each."""
    return sum(
        -(-len(samples) // (datasets[dataset].config.batch_size * processes))
        for (dataset, _), samples in _samples(datasets).items()
    )


class BatchPlan:
    """The batches of every epoch. Each sample occurs exactly once in an epoch.

    Args:
        datasets: The images.
        seed: Of all that is drawn.
        accumulation: Batches of an optimizer step.
        total_steps: Optimizer steps of the run.
        processes: How many share a batch: it holds ``batch_size`` samples for each of them.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        seed: int,
        *,
        accumulation: int = 1,
        total_steps: int = 0,
        processes: int = 1,
    ) -> None:
        self.datasets = datasets
        self.seed = seed
        self.accumulation = accumulation
        self.processes = processes
        self.batches_per_epoch = count_batches(datasets, processes)
        self._captions = [
            [subset.captions.in_steps(total_steps) for subset in dataset.config.subsets]
            for dataset in datasets
        ]

    def with_seed(self, seed: int) -> BatchPlan:
        """Give the same plan with another seed."""
        plan = copy(self)
        plan.seed = seed
        return plan

    def epoch(self, number: int) -> list[BatchSpec]:
        """Plan one epoch.

        Within a bucket the samples are shuffled and cut into batches, the last one smaller. Then
        the batches of all buckets and datasets are shuffled.

        Args:
            number: The epoch, counted from 1.
        """
        order = random.Random(derive_seed(self.seed, "order", number))
        parts: list[tuple[int, Size, list[Sample]]] = []
        for (dataset, bucket), samples in _samples(self.datasets).items():
            order.shuffle(samples)
            size = self.datasets[dataset].config.batch_size * self.processes
            parts += [
                (dataset, bucket, samples[start : start + size])
                for start in range(0, len(samples), size)
            ]
        order.shuffle(parts)
        before = (number - 1) * -(-self.batches_per_epoch // self.accumulation)
        return [
            BatchSpec(
                dataset=dataset,
                bucket=bucket,
                epoch=number,
                samples=tuple(self._views(dataset, number, samples)),
                step=before + position // self.accumulation,
            )
            for position, (dataset, bucket, samples) in enumerate(parts)
        ]

    def captions(self, spec: BatchSpec) -> list[str]:
        """Give the captions to train a batch with."""
        dataset = self.datasets[spec.dataset]
        return [
            process_caption(
                dataset.images[sample.image].caption,
                self._captions[spec.dataset][dataset.images[sample.image].subset],
                self._rng("caption", spec.dataset, spec.epoch, sample),
                spec.epoch,
                spec.step,
            )
            for sample in spec.samples
        ]

    def _views(self, index: int, epoch: int, samples: Sequence[Sample]) -> Iterator[Sample]:
        dataset = self.datasets[index]
        for sample in samples:
            image = dataset.images[sample.image]
            options = dataset.subset_of(image).views
            changes: dict[str, Any] = {}
            if options.flip_aug:
                changes["flipped"] = self._rng("flip", index, epoch, sample).random() < 0.5
            if options.color_aug:
                changes["colour"] = draw_colour(self._rng("colour", index, epoch, sample))
            if options.random_crop or options.face_crop_aug_range:
                changes["fit"] = drawn_fit(image, options, self._rng("crop", index, epoch, sample))
            yield replace(sample, **changes) if changes else sample

    def _rng(self, purpose: str, dataset: int, epoch: int, sample: Sample) -> random.Random:
        seed = derive_seed(self.seed, purpose, epoch, dataset, sample.image, sample.repeat)
        return random.Random(seed)


def _samples(datasets: Sequence[Dataset]) -> dict[tuple[int, Size], list[Sample]]:
    """Group all samples of an epoch by dataset and bucket."""
    groups: dict[tuple[int, Size], list[Sample]] = {}
    for index, dataset in enumerate(datasets):
        for number, image in enumerate(dataset.images):
            group = groups.setdefault((index, image.fit.bucket), [])
            group += [Sample(image=number, repeat=n) for n in range(image.repeats)]
    return groups
