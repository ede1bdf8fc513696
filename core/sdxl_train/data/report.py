"""What a scan found, for ``plan``: counts, lists, every value with its origin, as plain JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdxl_train.data.buckets import Size
    from sdxl_train.data.dataset_config import DatasetConfig, SubsetConfig
    from sdxl_train.data.records import Dataset, ImageRecord
    from sdxl_train.data.sources import Scan


def dataset_report(scan: Scan) -> dict[str, Any]:
    """Describe a scan; the keys are an interface.

    ``images`` are different training images, ``repeats`` the samples of an epoch that they make,
    ``regularization`` the different regularization images in use, ``with_caption`` and ``masks``
    how many of all these have a caption and a mask. ``validation`` counts the images that are held
    out of all this. ``buckets`` count different images; ``crop_share`` is the mean share of an
    image's area that is cut off, ``upscale_share`` the share of the images that are enlarged.
    """
    every = [image for dataset in scan.datasets for image in dataset.images]
    training = [image for image in every if not image.is_reg]
    return {
        "images": len(training),
        "repeats": sum(image.repeats for image in training),
        "regularization": len(every) - len(training),
        "validation": sum(len(dataset.images) for dataset in scan.validation),
        "with_caption": sum(image.has_caption for image in every),
        "masks": sum(_masks(dataset, dataset.images) for dataset in scan.datasets),
        "skipped": [{"path": str(s.path), "reason": s.reason} for s in scan.skipped],
        "buckets": _buckets(every),
        "duplicates": [[str(path) for path in group] for group in scan.duplicates],
        "tiny": [
            _sized(image) | {"scale": round(image.fit.scale(image.size), 3)}
            for image in every
            if image.fit.is_large_for(image.size)
        ],
        "extreme": [
            _sized(image) | {"crop_share": round(image.fit.crop_share, 3)}
            for image in every
            if image.fit.is_extreme_for(image.size)
        ],
        "datasets": _datasets(scan),
    }


def _sized(image: ImageRecord) -> dict[str, Any]:
    return {
        "path": str(image.path),
        "size": list(image.size),
        "bucket": list(image.fit.bucket),
    }


def _buckets(images: Sequence[ImageRecord]) -> list[dict[str, Any]]:
    groups: dict[Size, list[ImageRecord]] = {}
    for image in images:
        groups.setdefault(image.fit.bucket, []).append(image)
    return [
        {
            "resolution": list(size),
            "images": len(group),
            "repeats": sum(image.repeats for image in group),
            "crop_share": round(sum(image.fit.crop_share for image in group) / len(group), 4),
            "upscale_share": round(_num_enlarged(group) / len(group), 4),
        }
        for size, group in sorted(groups.items())
    ]


def _num_enlarged(images: Sequence[ImageRecord]) -> int:
    return sum(image.fit.scale(image.size) > 1 for image in images)


def _datasets(scan: Scan) -> list[dict[str, Any]]:
    """Describe each dataset once, also where all of it is held out."""
    held = {dataset.config.place: dataset for dataset in scan.validation}
    trained = {dataset.config.place: dataset for dataset in scan.datasets}
    described = []
    for place in dict.fromkeys([*trained, *held]):
        dataset = trained.get(place) or held[place]
        images = trained[place].images if place in trained else ()
        described.append(
            {
                "place": place,
                "images": len(images),
                "validation": len(held[place].images) if place in held else 0,
                "options": _options(dataset.config),
                "subsets": [
                    _subset(dataset, index, images) for index in range(len(dataset.config.subsets))
                ],
            }
        )
    return described


def _subset(dataset: Dataset, index: int, images: Sequence[ImageRecord]) -> dict[str, Any]:
    subset = dataset.config.subsets[index]
    members = [image for image in images if image.subset == index]
    return {
        "place": subset.place,
        "source": str(subset.source),
        "images": len(members),
        "repeats": sum(image.repeats for image in members),
        "with_caption": sum(image.has_caption for image in members),
        "masks": _masks(dataset, members),
        "options": _options(subset),
    }


def _masks(dataset: Dataset, images: Sequence[ImageRecord]) -> int:
    """Count the images with a mask: a file, or their own alpha channel."""
    return sum(image.mask is not None or dataset.subset_of(image).alpha_mask for image in images)


def _options(config: DatasetConfig | SubsetConfig) -> dict[str, dict[str, Any]]:
    return {
        name: {"value": _plain(value), "origin": config.origins[name]}
        for name, value in sorted(config.values.items())
    }


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
