"""From the plan of an epoch to batches of tensors.

Worker processes only decode images. Captions, sizes and cached encodings are put together in the
main process. No global random generator is drawn from or seeded.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from sdxl_train.data.batches import Batch, BatchSpec
from sdxl_train.data.images import ImageError, fit_image, load_image
from sdxl_train.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdxl_train.data.batches import BatchPlan
    from sdxl_train.data.buckets import Fit, Size
    from sdxl_train.data.cache import LatentCache, TextCache
    from sdxl_train.data.sources import Dataset


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
        self._loader: DataLoader[Tensor | str] | None = DataLoader(
            _BatchImages(datasets),
            sampler=_SpecSampler(self._specs),
            batch_size=None,
            num_workers=workers,
            persistent_workers=persistent_workers and workers > 0,
            # Its own generator: otherwise each iteration draws from the global one.
            generator=torch.Generator(),
        )

    def load(self, specs: Sequence[BatchSpec]) -> Iterator[Tensor]:
        """Give the pixels of each batch: fp32 [B, 3, H, W] in [-1, 1].

        Raises:
            TrainingError: If an image cannot be decoded; with its path.
        """
        assert self._loader is not None, "the loader is closed"
        self._specs[:] = specs
        for pixels in self._loader:
            if isinstance(pixels, str):
                raise TrainingError(pixels)
            yield (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5

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
                yield self._batch(spec, None, self.latents.latents(spec))
        else:
            for spec, pixels in zip(specs, self.pixels.load(specs), strict=True):
                yield self._batch(spec, pixels, None)

    def _batch(self, spec: BatchSpec, pixels: Tensor | None, latents: Tensor | None) -> Batch:
        dataset = self.plan.datasets[spec.dataset]
        images = [dataset.images[sample.image] for sample in spec.samples]
        captions = self.plan.captions(spec)
        crops = [
            (image.fit.crop[1], image.fit.crop_left(flipped=sample.flipped))
            for image, sample in zip(images, spec.samples, strict=True)
        ]
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
            keys=[image.key for image in images],
        )


class _BatchImages(TorchDataset["Tensor | str"]):
    """The decoded images of a batch; its index is the batch's specification."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._files: list[list[tuple[Path, Size, Fit]]] = [
            [(image.path, image.size, image.fit) for image in dataset.images]
            for dataset in datasets
        ]

    def __getitem__(self, spec: BatchSpec) -> Tensor | str:
        """Give uint8 [B, H, W, 3], a quarter of the size to send between processes, or a fault."""
        arrays = []
        for sample in spec.samples:
            path, size, fit = self._files[spec.dataset][sample.image]
            try:
                image = load_image(path)
            except ImageError as error:
                return f"{path}: {error}"
            if image.size != size:
                now, then = (f"{width}x{height}" for width, height in (image.size, size))
                return f"{path}: has changed since the start: {now} instead of {then}"
            pixels = torch.from_numpy(fit_image(image, fit))
            arrays.append(pixels.flip(1) if sample.flipped else pixels)
        return torch.stack(arrays)


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
