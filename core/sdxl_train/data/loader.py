"""From the plan of an epoch to batches of tensors.

Worker processes only decode images. Captions, sizes and cached encodings are put together in the
main process. No global random generator is drawn from or seeded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from sdxl_train.data.batches import Batch, BatchSpec
from sdxl_train.data.images import (
    ImageError,
    fit_image,
    load_image,
    load_mask,
    load_with_alpha,
)
from sdxl_train.data.views import coloured
from sdxl_train.errors import TrainingError
from sdxl_train.signals import leave_to_parent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

    from sdxl_train.data.batches import BatchPlan, Sample
    from sdxl_train.data.buckets import Fit, Size
    from sdxl_train.data.cache import LatentCache, TextCache
    from sdxl_train.data.dataset_config import SubsetConfig
    from sdxl_train.data.records import Dataset, ImageRecord


class Images(NamedTuple):
    """The images of a batch.

    Attributes:
        pixels: fp32 [B, 3, H, W] in [-1, 1].
        masks: fp32 [B, 1, H, W] in [0, 1], ones for an image without a mask; None if no image of
            the batch has one.
    """

    pixels: Tensor
    masks: Tensor | None


class PixelLoader:
    """Loads the images of batches, in worker processes if there are any.

    Args:
        datasets: The datasets that the batches refer to.
        num_workers: Number of worker processes, limited to the CPU cores; 0 loads in this process.
        persistent_workers: Keep the processes for the next call.
    """

    def __init__(
        self, datasets: Sequence[Dataset], *, num_workers: int, persistent_workers: bool = False
    ) -> None:
        self._specs: list[BatchSpec] = []
        workers = min(num_workers, _num_cores())
        self._loader: DataLoader[_Decoded | str] | None = DataLoader(
            _BatchImages(datasets),
            sampler=_SpecSampler(self._specs),
            batch_size=None,
            num_workers=workers,
            persistent_workers=persistent_workers and workers > 0,
            worker_init_fn=leave_to_parent,
            # Its own generator: otherwise each iteration draws from the global one.
            generator=torch.Generator(),
        )

    def load(self, specs: Sequence[BatchSpec]) -> Iterator[Images]:
        """Give the images of each batch.

        Raises:
            TrainingError: If an image cannot be decoded; with its path.
        """
        assert self._loader is not None, "the loader is closed"
        self._specs[:] = specs
        for decoded in self._loader:
            if isinstance(decoded, str):
                raise TrainingError(decoded)
            pixels, masks = decoded
            yield Images(
                (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5,
                masks[:, None].float() / 255 if masks is not None else None,
            )

    def close(self) -> None:
        """End the worker processes. Left to the garbage collector, that can take seconds."""
        self._loader = None


class BatchLoader:
    """Makes batches of a plan's specifications.

    Args:
        plan: The plan that they come from.
        pixels: Loads images; unused where latents are cached.
        prior_loss_weight: Weight of the loss of regularization images.
        latents: The cache of latents, filled; None to deliver pixels.
        text: The cache of text encodings, filled; None to deliver captions only.
    """

    def __init__(
        self,
        plan: BatchPlan,
        pixels: PixelLoader,
        *,
        prior_loss_weight: float = 1.0,
        latents: LatentCache | None = None,
        text: TextCache | None = None,
    ) -> None:
        self.plan = plan
        self.pixels = pixels
        self.prior_loss_weight = prior_loss_weight
        self.latents = latents
        self.text = text

    def batches(self, specs: Sequence[BatchSpec]) -> Iterator[Batch]:
        """Give the batches of some specifications, in their order.

        To go on in the middle of an epoch, pass the rest of it: ``plan.epoch(3)[start:]``.
        """
        if self.latents is not None:
            for spec in specs:
                latents, masks = self.latents.read(spec)
                yield self._batch(spec, None, latents, masks)
        else:
            for spec, images in zip(specs, self.pixels.load(specs), strict=True):
                yield self._batch(spec, images.pixels, None, images.masks)

    def keys(self, spec: BatchSpec) -> list[str]:
        """Give the short names of the images of a batch."""
        images = self.plan.datasets[spec.dataset].images
        return [images[sample.image].key for sample in spec.samples]

    def _batch(
        self, spec: BatchSpec, pixels: Tensor | None, latents: Tensor | None, masks: Tensor | None
    ) -> Batch:
        dataset = self.plan.datasets[spec.dataset]
        images = [dataset.images[sample.image] for sample in spec.samples]
        captions = self.plan.captions(spec)
        fits = [sample.fit or image.fit for image, sample in zip(images, spec.samples, strict=True)]
        crops = [
            (fit.crop[1], fit.crop_left(flipped=sample.flipped))
            for fit, sample in zip(fits, spec.samples, strict=True)
        ]
        preserved = [dataset.subset_of(image).preserves_output for image in images]
        weights = [self.prior_loss_weight if image.is_reg else 1.0 for image in images]
        return Batch(
            pixels=pixels,
            latents=latents,
            captions=captions,
            text=self.text.text(captions) if self.text is not None else None,
            original_size=torch.tensor([image.size[::-1] for image in images]),
            crop_top_left=torch.tensor(crops),
            target_size=torch.tensor([image.fit.bucket[::-1] for image in images]),
            loss_weights=torch.tensor(weights, dtype=torch.float32),
            keys=self.keys(spec),
            masks=masks,
            preserved=torch.tensor(preserved) if any(preserved) else None,
            share=spec.share,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """What a worker knows of an image."""

    path: Path
    size: Size
    fit: Fit
    interpolation: str | None
    mask: Path | None
    alpha_mask: bool

    @classmethod
    def of(cls, image: ImageRecord, subset: SubsetConfig) -> _Source:
        return cls(
            path=image.path,
            size=image.size,
            fit=image.fit,
            interpolation=subset.resize_interpolation,
            mask=image.mask,
            alpha_mask=subset.alpha_mask,
        )

    def view(self, sample: Sample) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Give the pixels [H, W, 3] of a sample, and its mask [H, W] if it has one.

        Raises:
            ImageError: If a file cannot be decoded or is not what it was; with its path.
        """
        image, mask = self._load()
        if image.size != self.size:
            now, then = (f"{width}x{height}" for width, height in (image.size, self.size))
            raise ImageError(f"{self.path}: has changed since the start: {now} instead of {then}")
        fit = sample.fit or self.fit
        pixels = fit_image(image, fit, self.interpolation)
        if sample.colour is not None:
            pixels = coloured(pixels, sample.colour)
        weights = fit_image(mask, fit, self.interpolation) if mask is not None else None
        if sample.flipped:
            pixels = pixels[:, ::-1]
            weights = weights[:, ::-1] if weights is not None else None
        return pixels, weights

    def _load(self) -> tuple[Image.Image, Image.Image | None]:
        path = self.path
        try:
            if self.alpha_mask:
                return load_with_alpha(path)
            image, mask = load_image(path), None
            if self.mask is not None:
                path = self.mask
                mask = load_mask(path)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from None
        if mask is not None and mask.size != image.size:
            mask = mask.resize(image.size)
        return image, mask


class _BatchImages(TorchDataset["_Decoded | str"]):
    """The decoded images of a batch; its index is the batch's specification."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._sources = [
            [_Source.of(image, dataset.subset_of(image)) for image in dataset.images]
            for dataset in datasets
        ]

    def __getitem__(self, spec: BatchSpec) -> _Decoded | str:
        """Give the images and masks in bytes, a quarter of the size to send, or a fault."""
        images: list[Tensor] = []
        masks: list[Tensor | None] = []
        for sample in spec.samples:
            try:
                pixels, mask = self._sources[spec.dataset][sample.image].view(sample)
            except ImageError as error:
                return str(error)
            images.append(torch.from_numpy(np.ascontiguousarray(pixels)))
            masks.append(None if mask is None else torch.from_numpy(np.ascontiguousarray(mask)))
        return torch.stack(images), _stacked(masks, images[0].shape[:2])


_Decoded: TypeAlias = "tuple[Tensor, Tensor | None]"
"""uint8 [B, H, W, 3] and, if any image has a mask, uint8 [B, H, W]."""


def _stacked(masks: Sequence[Tensor | None], size: torch.Size) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    whole = torch.full(size, 255, dtype=torch.uint8)
    return torch.stack([whole if mask is None else mask for mask in masks])


class _SpecSampler:
    """Feeds the specifications that are current when an iteration starts."""

    def __init__(self, specs: list[BatchSpec]) -> None:
        self._specs = specs

    def __iter__(self) -> Iterator[BatchSpec]:
        return iter(tuple(self._specs))

    def __len__(self) -> int:
        return len(self._specs)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on Windows and macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
