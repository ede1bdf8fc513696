"""The batches of every step, on the device and with latents; caches filled before."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sdxl_train.data.batches import Share
from sdxl_train.data.cache import LatentCache, MemoryStore, TextCache, latent_keys
from sdxl_train.data.disk_store import (
    DiskStore,
    check_unchanged,
    latent_entries,
    text_entries,
)
from sdxl_train.data.foreign_latents import ImportingStore
from sdxl_train.data.loader import BatchLoader, PixelLoader
from sdxl_train.loop import StepBatches
from sdxl_train.progress import progress
from sdxl_train.protocols import LatentReader, UnreadEncoders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from sdxl_train.data.batches import Batch, BatchPlan, BatchSpec
    from sdxl_train.data.buckets import Size
    from sdxl_train.data.cache import LatentKey, Store
    from sdxl_train.data.entry_file import Entry
    from sdxl_train.preflight import Prepared
    from sdxl_train.protocols import LoadedModel
    from sdxl_train.ranks import Ranks

logger = logging.getLogger(__name__)

K = TypeVar("K")


@dataclass(frozen=True, kw_only=True)
class Unmade:
    """What filling the caches would encode.

    Attributes:
        images: The (width, height) of each image to encode.
        captions: How many captions.
    """

    images: Sequence[Size]
    captions: int


class Supply:
    """Feeds a run with data.

    Args:
        prepared: The run.
        model: Encodes images and captions.
        device: Where the batches are wanted.
        autocast: The precision in which captions are encoded.
        trains_text: Leave captions to the step, which encodes them with their gradients.
        ranks: The processes that share the batches; this one gets its parts.
        imports_latents: Take over another program's latents where they can be verified.
    """

    def __init__(
        self,
        prepared: Prepared,
        model: LoadedModel,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        trains_text: bool,
        ranks: Ranks,
        imports_latents: bool = False,
    ) -> None:
        self.prepared = prepared
        self.options = prepared.config.dataset
        self.model = model
        self.device = device
        self.autocast = autocast
        self.trains_text = trains_text
        self.ranks = ranks
        self.imports_latents = imports_latents
        self._loader = self._loader_of(prepared.batches)
        self._validation = self._loader_of(prepared.validation) if prepared.validation else None

    def fill_caches(self) -> None:
        """Fill the caches that the options ask for, then free what only they needed."""
        options = self.options
        if isinstance(self.model, UnreadEncoders):
            self.model.read_encoders(
                images=not options.caches_latents, text=not options.caches_text
            )
        if self.options.caches_latents:
            stores = self._latent_stores()
            for loader, latents in zip(self._loaders, stores, strict=True):
                self._cache_latents(loader, latents)
            self.model.release_image_encoder()
        if self.options.caches_text:
            texts = self._text_stores()
            for loader, text in zip(self._loaders, texts, strict=True):
                self._cache_text(loader, text)
            self.model.release_text_encoders()

    def unmade(self) -> Unmade:
        """Tell what :meth:`fill_caches` would encode. No image is read that nobody ever encoded."""
        images: list[Size] = []
        captions = 0
        if self.options.caches_latents:
            known = all(map(self._knows_images, self._loaders))
            stores = self._latent_stores() if known else [MemoryStore() for _ in self._loaders]
            for loader, latents in zip(self._loaders, stores, strict=True):
                datasets = loader.plan.datasets
                keys = (key for key in latent_keys(datasets) if key not in latents)
                images += [datasets[index].images[image].fit.bucket for index, image, _ in keys]
        if self.options.caches_text:
            for loader, text in zip(self._loaders, self._text_stores(), strict=True):
                cache = TextCache(loader.plan.datasets)
                captions += sum(caption not in text for caption in cache.captions)
        return Unmade(images=images, captions=captions)

    def _knows_images(self, loader: BatchLoader) -> bool:
        """Tell whether the content of all images is known, as it is of those once encoded."""
        index = self.prepared.scan.index
        paths = (image.path for dataset in loader.plan.datasets for image in dataset.images)
        return all(index.folder(path.parent).known_content(path.name) for path in paths)

    def disk_entries(self) -> Iterator[Entry]:
        """Give the files of all that the options keep on the disk."""
        if self.options.cache_latents_to_disk:
            yield from chain.from_iterable(each.values() for each in self._latent_entries())
        if self.options.cache_text_encoder_outputs_to_disk:
            yield from chain.from_iterable(each.values() for each in self._text_entries())

    def _latent_stores(self) -> list[Store[LatentKey]]:
        """Give the place of each loader's latents."""
        if not self.options.cache_latents_to_disk:
            return [MemoryStore() for _ in self._loaders]
        if self.imports_latents and isinstance(self.model, LatentReader):
            index, check = self.prepared.scan.index, not self.options.skip_cache_check
            return [
                ImportingStore(loader.plan.datasets, self.model, entries, index, check=check)
                for loader, entries in zip(self._loaders, self._latent_entries(), strict=True)
            ]
        return self._disk_stores("latents", self._latent_entries())

    def _latent_entries(self) -> list[dict[LatentKey, Entry]]:
        index, encoder = self.prepared.scan.index, self.model.image_encoder_identity()
        return [
            latent_entries(loader.plan.datasets, latent_keys(loader.plan.datasets), index, encoder)
            for loader in self._loaders
        ]

    def _text_stores(self) -> list[Store[str]]:
        """Give the place of each loader's encoded captions."""
        if not self.options.cache_text_encoder_outputs_to_disk:
            return [MemoryStore() for _ in self._loaders]
        return self._disk_stores("captions", self._text_entries())

    def _text_entries(self) -> list[dict[str, Entry]]:
        precision = self.prepared.config.training.mixed_precision
        encoders = {**self.model.text_encoders_identity(), "mixed_precision": precision}
        return [text_entries(loader.plan.datasets, encoders) for loader in self._loaders]

    def _disk_stores(self, title: str, entries: Sequence[Mapping[K, Entry]]) -> list[Store[K]]:
        index, check = self.prepared.scan.index, not self.options.skip_cache_check
        stores: list[Store[K]] = [DiskStore(title, each, index, check=check) for each in entries]
        if remark := index.save():
            logger.warning("%s", remark)
        return stores

    def _cache_latents(self, loader: BatchLoader, store: Store[LatentKey]) -> None:
        loader.latents = LatentCache(loader.plan.datasets, store)
        with progress("caching latents", "img", shown=self.ranks.main) as show:
            loader.latents.fill(
                loader.pixels,
                self._encode_images,
                batch_size=self.options.vae_batch_size,
                progress=show,
                check=partial(check_unchanged, self.prepared.scan.index),
                ranks=self.ranks,
            )
        loader.pixels.close()
        _tell(store)

    def _cache_text(self, loader: BatchLoader, store: Store[str]) -> None:
        loader.text = TextCache(loader.plan.datasets, store)
        with (
            progress("caching text encoder outputs", "caption", shown=self.ranks.main) as show,
            self.autocast(),
        ):
            loader.text.fill(
                self.model.encode_text,
                batch_size=self.options.text_encoder_batch_size,
                progress=show,
                ranks=self.ranks,
            )
        _tell(store)

    def steps(self, start: int = 0) -> Iterator[StepBatches]:
        """Give the batches of every step: whole epochs, the last one cut at the total.

        Args:
            start: Steps to pass over, at no cost: those that were done before.
        """
        counts = self.prepared.counts
        accumulation = self.prepared.config.training.gradient_accumulation_steps
        done = start
        for epoch in range(start // counts.steps_per_epoch + 1, counts.epochs + 1):
            first = done % counts.steps_per_epoch
            last = first + counts.total - done
            specs = self.prepared.batches.epoch(epoch)[first * accumulation : last * accumulation]
            batches = self._parts(specs)
            for position in range(0, len(specs), accumulation):
                of_step = specs[position : position + accumulation]
                yield StepBatches(
                    epoch=epoch,
                    batches=[next(batches) for _ in of_step],
                    keys=tuple(key for spec in of_step for key in self._loader.keys(spec)),
                )
                done += 1

    def _parts(self, specs: Sequence[BatchSpec]) -> Iterator[Batch | Share]:
        """Give this process's part of each batch; a bare share where there is none for it."""
        if self.ranks.count == 1:
            yield from self._ready(self._loader.batches(specs))
            return
        parts = [spec.part(self.ranks.index, self.ranks.count) for spec in specs]
        if self.prepared.config.processes.spreads_base:
            parts = [_busy(part, spec) for part, spec in zip(parts, specs, strict=True)]
        batches = self._ready(self._loader.batches([part for part in parts if part.samples]))
        for part in parts:
            assert part.share is not None
            batch = next(batches) if part.samples else part.share
            yield self._with_all_latents(batch) if self.prepared.config.noises else batch

    def _with_all_latents(self, batch: Batch | Share) -> Batch | Share:
        """Add the latents that the other processes have of a batch: its noises look at them."""
        idle = isinstance(batch, Share) or batch.share is None or batch.share.idle
        own = None if idle else batch.latents
        parts = self.ranks.gather(None if own is None else own.cpu())
        if isinstance(batch, Share) or batch.share is None:
            return batch
        whole = torch.cat([part for part in parts if part is not None]).to(self.device)
        return replace(batch, share=replace(batch.share, latents=whole))

    def validation(self, limit: int | None = None) -> Iterator[Batch]:
        """Give the held-out batches, on the device and with latents; none if nothing is held out.

        They are the same each time, in the same order, and draw from no stream of training: no
        augmentation, no dropped or shuffled captions. ``Prepared.validation`` plans them; its
        ``batches_per_epoch`` is their number.

        Args:
            limit: How many to give at most.
        """
        if self._validation is not None:
            specs = self._validation.plan.epoch(1)[:limit]
            yield from self._ready(self._validation.batches(specs))

    def close(self) -> None:
        """End the worker processes."""
        for loader in self._loaders:
            loader.pixels.close()

    @property
    def _loaders(self) -> list[BatchLoader]:
        return [loader for loader in (self._loader, self._validation) if loader is not None]

    def _loader_of(self, plan: BatchPlan) -> BatchLoader:
        pixels = PixelLoader(
            plan.datasets,
            num_workers=self.options.max_data_loader_n_workers,
            persistent_workers=self.options.persistent_data_loader_workers,
        )
        return BatchLoader(plan, pixels, prior_loss_weight=self.options.prior_loss_weight)

    def _ready(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            moved = batch.to(self.device, pinned=self.prepared.config.training.pin_memory)
            if moved.latents is None:
                assert moved.pixels is not None
                moved = replace(moved, latents=self._encode_images(moved.pixels), pixels=None)
            if moved.text is None and not self.trains_text:
                moved = replace(moved, text=self._encode_text(moved.captions))
            yield moved

    def _encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Encode as many captions at a time as ``text_encoder_batch_size`` allows."""
        size = self.options.text_encoder_batch_size
        with torch.no_grad(), self.autocast():
            parts = [
                self.model.encode_text(captions[start : start + size])
                for start in range(0, len(captions), size)
            ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _encode_images(self, images: Tensor) -> Tensor:
        """Encode as many images at a time as ``vae_batch_size`` allows."""
        parts = torch.split(images, self.options.vae_batch_size)
        with torch.no_grad():
            latents = [self.model.encode_images(part.to(self.device)) for part in parts]
        # Cached latents are contiguous: another layout would round differently in the denoiser.
        return torch.cat(latents).contiguous()


def _busy(part: BatchSpec, whole: BatchSpec) -> BatchSpec:
    """Give a process that has nothing of a batch a sample of it, to no effect."""
    if part.samples or part.share is None:
        return part
    return replace(part, samples=whole.samples[:1], share=replace(part.share, idle=True))


def _tell(store: Store[Any]) -> None:
    if isinstance(store, DiskStore):
        logger.info("%s", store.report())
