"""The images that are held out of training, to validate on.

A share of the images of each subset, chosen by a hash of the seed and of folder and file name: the
same wherever the folder lies, whatever the order of the files, and nearly the same when files are
added. An image that any dataset holds out is trained by none, so the two sides have no image in
common. Regularization images are never held out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sdxl_train.data.views import ViewOptions
from sdxl_train.rng import derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sdxl_train.data.dataset_config import DatasetConfig
    from sdxl_train.data.records import ImageRecord


def held_out(config: DatasetConfig, images: Sequence[ImageRecord]) -> frozenset[Path]:
    """Give the resolved paths of the images that a dataset holds out."""
    if not config.validation_split:
        return frozenset()
    held: set[Path] = set()
    for index in range(len(config.subsets)):
        members = [image for image in images if image.subset == index and not image.is_reg]
        members.sort(key=lambda image: derive_seed(config.validation_seed, "held out", image.key))
        count = round(config.validation_split * len(members))
        held |= {image.path.resolve() for image in members[:count]}
    return frozenset(held)


def validation_images(
    images: Sequence[ImageRecord], held: frozenset[Path]
) -> Iterator[ImageRecord]:
    """Give the held-out images of a dataset, each once."""
    for image in images:
        if not image.is_reg and image.path.resolve() in held:
            yield image._replace(repeats=1)


def fixed(config: DatasetConfig) -> DatasetConfig:
    """Give a dataset's configuration with nothing left to chance, to validate with."""
    subsets = tuple(
        replace(subset, captions=subset.captions.without_chance(), views=ViewOptions())
        for subset in config.subsets
    )
    return replace(config, subsets=subsets)
