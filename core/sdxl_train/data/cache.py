"""Encodings of images and captions, made once and kept: in memory, or in files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar

import torch

from sdxl_train.data.batches import BatchSpec, Sample
from sdxl_train.data.captions import possible_captions
from sdxl_train.data.entry_file import is_finite
from sdxl_train.errors import UserError
from sdxl_train.masks import shrunk_masks
from sdxl_train.ranks import ALONE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdxl_train.data.loader import Images, PixelLoader
    from sdxl_train.data.records import Dataset
    from sdxl_train.ranks import Ranks

LatentKey: TypeAlias = tuple[int, int, bool]
"""Index of the dataset, index of the image in it, whether it is mirrored."""

K = TypeVar("K", contravariant=True)
H = TypeVar("H")


class Store(Protocol[K]):
    """Where encodings are kept: tensors of one sample, on the CPU, under their names."""

    def __contains__(self, key: K, /) -> bool:
        """Tell whether an encoding need not be made."""

    def put(self, key: K, tensors: dict[str, Tensor], /) -> None:
        """Keep an encoding."""

    def adopt(self, key: K, tensors: dict[str, Tensor], /) -> None:
        """Take an encoding that another process has made and kept."""

    def get(self, key: K, /) -> dict[str, Tensor]:
        """Give an encoding that is held."""


class MemoryStore(Generic[K]):
    """Keeps encodings in memory, for this run."""

    def __init__(self) -> None:
        self._encodings: dict[K, dict[str, Tensor]] = {}

    def __contains__(self, key: K) -> bool:
        """Tell whether an encoding need not be made."""
        return key in self._encodings

    def put(self, key: K, tensors: dict[str, Tensor]) -> None:
        """Keep an encoding."""
        self._encodings[key] = tensors

    def adopt(self, key: K, tensors: dict[str, Tensor]) -> None:
        """Take an encoding that another process has made."""
        self._encodings.setdefault(key, tensors)

    def get(self, key: K) -> dict[str, Tensor]:
        """Give an encoding that is held."""
        return self._encodings[key]


class LatentCache:
    """The latents of every image, also mirrored where the subset mirrors.

    Args:
        datasets: The images.
        store: Keeps the latents. Default: in memory.
    """

    def __init__(self, datasets: Sequence[Dataset], store: Store[LatentKey] | None = None) -> None:
        self.datasets = datasets
        self._store: Store[LatentKey] = MemoryStore() if store is None else store

    def fill(
        self,
        pixels: PixelLoader,
        encode_images: Callable[[Tensor], Tensor],
        *,
        batch_size: int,
        progress: Callable[[int, int], None],
        check: Callable[[Path], None] = lambda _: None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Encode all images that the store does not hold.

        Args:
            pixels: Loads the images.
            encode_images: fp32 [B, 3, H, W] in [-1, 1], on the CPU, to latents [B, C, h, w].
            batch_size: Images encoded at a time; only those of one bucket go together.
            progress: Told the number of images done and their total, after each batch.
            check: Called with the path of an image before its latents are kept.
            ranks: The processes that share the work; each has all latents in the end.

        Raises:
            TrainingError: If an image cannot be decoded.
            UserError: If the latents of an image are not finite, or cannot be kept.
        """

        def encoded(specs: Sequence[BatchSpec]) -> Iterator[dict[LatentKey, dict[str, Tensor]]]:
            for spec, images in zip(specs, pixels.load(specs), strict=True):
                encodings = self._encode(spec, images, encode_images)
                for key, encoding in encodings.items():
                    check(self._path(key))
                    self._store.put(key, encoding)
                yield encodings

        keys = _missing(latent_keys(self.datasets), self._store, ranks)
        done = 0
        for encodings in ranks.share_out(self._specs(keys, batch_size), encoded):
            for key, encoding in encodings.items():
                if key not in self._store:
                    self._store.adopt(key, encoding)
            done += len(encodings)
            progress(done, len(keys))

    def _encode(
        self, spec: BatchSpec, images: Images, encode_images: Callable[[Tensor], Tensor]
    ) -> dict[LatentKey, dict[str, Tensor]]:
        with torch.no_grad():
            latents = encode_images(images.pixels).to("cpu", torch.float32)
        encodings = {}
        for number, (sample, latent) in enumerate(zip(spec.samples, latents, strict=True)):
            key = (spec.dataset, sample.image, sample.flipped)
            encoding = {"latents": latent.clone()}
            if images.masks is not None:
                mask = images.masks[number : number + 1]
                encoding["mask"] = shrunk_masks(mask, latents.shape[-2:])[0].clone()
            if not is_finite(encoding):
                raise UserError.of(
                    str(self._path(key)),
                    "its latents are not finite (NaN or infinite)",
                    "the usual cause is a VAE in fp16: use --no_half_vae",
                )
            encodings[key] = encoding
        return encodings

    def _path(self, key: LatentKey) -> Path:
        return self.datasets[key[0]].images[key[1]].path

    def read(self, spec: BatchSpec) -> tuple[Tensor, Tensor | None]:
        """Give the latents of a batch, and its masks if any image has one.

        Returns:
            fp32 [B, C, h, w], and fp32 [B, 1, h, w] of the same size.
        """
        keys = [(spec.dataset, sample.image, sample.flipped) for sample in spec.samples]
        encodings = [self._store.get(key) for key in keys]
        latents = torch.stack([encoding["latents"] for encoding in encodings])
        if not any("mask" in encoding for encoding in encodings):
            return latents, None
        whole = torch.ones(1, *latents.shape[-2:])
        return latents, torch.stack([encoding.get("mask", whole) for encoding in encodings])

    def _specs(self, keys: Sequence[LatentKey], batch_size: int) -> list[BatchSpec]:
        """Group latents by dataset and bucket."""
        groups: dict[tuple[int, tuple[int, int]], list[Sample]] = {}
        for index, number, flipped in keys:
            bucket = self.datasets[index].images[number].fit.bucket
            sample = Sample(image=number, repeat=0, flipped=flipped)
            groups.setdefault((index, bucket), []).append(sample)
        return [
            BatchSpec(
                dataset=index,
                bucket=bucket,
                epoch=0,
                samples=tuple(group[start : start + batch_size]),
            )
            for (index, bucket), group in groups.items()
            for start in range(0, len(group), batch_size)
        ]


def _missing(keys: Sequence[H], store: Store[H], ranks: Ranks) -> list[H]:
    """Give what some process does not hold: each may see other files."""
    missing: set[H] = set()
    missing.update(*ranks.gather({key for key in keys if key not in store}))
    return [key for key in keys if key in missing]


def latent_keys(datasets: Sequence[Dataset]) -> list[LatentKey]:
    """List the latents that training may want."""
    return [
        (index, number, flipped)
        for index, dataset in enumerate(datasets)
        for number, image in enumerate(dataset.images)
        for flipped in ((False, True) if dataset.subset_of(image).views.flip_aug else (False,))
    ]


class TextCache:
    """What the text encoders make of every caption that may be trained.

    Keyed by the final caption, prefix and suffix included; the empty one is among them where
    captions are dropped. Tags must not change from time to time.

    Args:
        datasets: Have the captions.
        store: Keeps the encodings. Default: in memory.
    """

    def __init__(self, datasets: Sequence[Dataset], store: Store[str] | None = None) -> None:
        self.captions: tuple[str, ...] = tuple(
            dict.fromkeys(
                caption
                for dataset in datasets
                for image in dataset.images
                for caption in possible_captions(image.caption, dataset.subset_of(image).captions)
            )
        )
        self._store: Store[str] = MemoryStore() if store is None else store

    def fill(
        self,
        encode_text: Callable[[Sequence[str]], dict[str, Tensor]],
        *,
        batch_size: int,
        progress: Callable[[int, int], None],
        ranks: Ranks = ALONE,
    ) -> None:
        """Encode all captions that the store does not hold.

        Args:
            encode_text: Captions to tensors that have the batch first.
            batch_size: Captions encoded at a time.
            progress: Told the number of captions done and their total, after each batch.
            ranks: The processes that share the work; each has all encodings in the end.

        Raises:
            UserError: If an encoding is not finite, or cannot be kept.
        """

        def encoded(batches: Sequence[list[str]]) -> Iterator[dict[str, dict[str, Tensor]]]:
            for captions in batches:
                encodings = _encode_captions(captions, encode_text)
                for caption, encoding in encodings.items():
                    self._store.put(caption, encoding)
                yield encodings

        missing = _missing(self.captions, self._store, ranks)
        batches = [missing[n : n + batch_size] for n in range(0, len(missing), batch_size)]
        done = 0
        for encodings in ranks.share_out(batches, encoded):
            for caption, encoding in encodings.items():
                if caption not in self._store:
                    self._store.adopt(caption, encoding)
            done += len(encodings)
            progress(done, len(missing))

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Give the encodings of captions, the batch first."""
        encodings = [self._store.get(caption) for caption in captions]
        return {name: torch.stack([e[name] for e in encodings]) for name in encodings[0]}


def _encode_captions(
    captions: Sequence[str], encode_text: Callable[[Sequence[str]], dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    with torch.no_grad():
        encoded = {name: tensor.to("cpu") for name, tensor in encode_text(captions).items()}
    encodings = {}
    for index, caption in enumerate(captions):
        encoding = {name: tensor[index].clone() for name, tensor in encoded.items()}
        if not is_finite(encoding):
            raise UserError.of(
                f"caption {caption!r}",
                "its encoding is not finite (NaN or infinite)",
                "check the base model's text encoders, or use another --mixed_precision",
            )
        encodings[caption] = encoding
    return encodings
