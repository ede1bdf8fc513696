"""Encodings of images and captions, made once and kept in memory on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdxl_train.data.batches import BatchSpec, Sample
from sdxl_train.data.captions import possible_captions
from sdxl_train.errors import TrainingError
from sdxl_train.masks import shrunk_masks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sdxl_train.data.loader import PixelLoader
    from sdxl_train.data.sources import Dataset


class LatentCache:
    """The latents of every image, also mirrored where the subset mirrors."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = datasets
        self._latents: dict[tuple[int, int, bool], Tensor] = {}
        self._masks: dict[tuple[int, int, bool], Tensor] = {}

    def fill(
        self,
        pixels: PixelLoader,
        encode_images: Callable[[Tensor], Tensor],
        *,
        batch_size: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Encode all images.

        Args:
            pixels: Loads the images.
            encode_images: fp32 [B, 3, H, W] in [-1, 1], on the CPU, to latents [B, C, h, w].
            batch_size: Images encoded at a time; only those of one bucket go together.
            progress: Told the number of images done and their total, after each batch.

        Raises:
            TrainingError: If an image cannot be decoded, or its latents are not finite.
        """
        specs = self._specs(batch_size)
        done, total = 0, sum(len(spec.samples) for spec in specs)
        for spec, images in zip(specs, pixels.load(specs), strict=True):
            with torch.no_grad():
                latents = encode_images(images.pixels).to("cpu", torch.float32)
            if images.masks is not None:
                masks = shrunk_masks(images.masks, latents.shape[-2:])
                for sample, mask in zip(spec.samples, masks, strict=True):
                    self._masks[spec.dataset, sample.image, sample.flipped] = mask.clone()
            for sample, latent in zip(spec.samples, latents, strict=True):
                if not bool(torch.isfinite(latent).all()):
                    path = self.datasets[spec.dataset].images[sample.image].path
                    raise TrainingError(
                        f"{path}: its latents are not finite (NaN or infinite). The usual cause is "
                        "a VAE in fp16: use --no_half_vae"
                    )
                self._latents[spec.dataset, sample.image, sample.flipped] = latent.clone()
            done += len(spec.samples)
            progress(done, total)

    def latents(self, spec: BatchSpec) -> Tensor:
        """Give the latents of a batch: fp32 [B, C, h, w]."""
        return torch.stack(
            [self._latents[spec.dataset, sample.image, sample.flipped] for sample in spec.samples]
        )

    def masks(self, spec: BatchSpec) -> Tensor | None:
        """Give the masks of a batch, of the size of its latents: fp32 [B, 1, h, w]."""
        keys = [(spec.dataset, sample.image, sample.flipped) for sample in spec.samples]
        if not any(key in self._masks for key in keys):
            return None
        return torch.stack([self._masks[key] for key in keys])

    def _specs(self, batch_size: int) -> list[BatchSpec]:
        specs = []
        for index, dataset in enumerate(self.datasets):
            groups: dict[tuple[int, int], list[Sample]] = {}
            for number, image in enumerate(dataset.images):
                group = groups.setdefault(image.fit.bucket, [])
                group.append(Sample(image=number, repeat=0))
                if dataset.subset_of(image).views.flip_aug:
                    group.append(Sample(image=number, repeat=0, flipped=True))
            specs += [
                BatchSpec(
                    dataset=index,
                    bucket=bucket,
                    epoch=0,
                    samples=tuple(group[start : start + batch_size]),
                )
                for bucket, group in groups.items()
                for start in range(0, len(group), batch_size)
            ]
        return specs


class TextCache:
    """What the text encoders make of every caption that may be trained.

    Keyed by the final caption, prefix and suffix included; the empty one is among them where
    captions are dropped. Tags must not change from time to time.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.captions: tuple[str, ...] = tuple(
            dict.fromkeys(
                caption
                for dataset in datasets
                for image in dataset.images
                for caption in possible_captions(image.caption, dataset.subset_of(image).captions)
            )
        )
        self._encodings: dict[str, dict[str, Tensor]] = {}

    def fill(
        self,
        encode_text: Callable[[Sequence[str]], dict[str, Tensor]],
        *,
        batch_size: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Encode all captions.

        Args:
            encode_text: Captions to tensors that have the batch first.
            batch_size: Captions encoded at a time.
            progress: Told the number of captions done and their total, after each batch.

        Raises:
            TrainingError: If an encoding is not finite.
        """
        for start in range(0, len(self.captions), batch_size):
            captions = self.captions[start : start + batch_size]
            with torch.no_grad():
                encoded = {name: t.to("cpu") for name, t in encode_text(captions).items()}
            for index, caption in enumerate(captions):
                encoding = {name: tensor[index].clone() for name, tensor in encoded.items()}
                if not all(bool(torch.isfinite(tensor).all()) for tensor in encoding.values()):
                    raise TrainingError(f"the encoding of caption {caption!r} is not finite")
                self._encodings[caption] = encoding
            progress(start + len(captions), len(self.captions))

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Give the encodings of captions, the batch first."""
        encodings = [self._encodings[caption] for caption in captions]
        return {name: torch.stack([e[name] for e in encodings]) for name in encodings[0]}
