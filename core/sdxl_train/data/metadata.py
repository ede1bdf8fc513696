"""What the saved file tells about the data, under the keys that sd-scripts writes.

Tools for LoRA files read these: tag frequencies, folders, buckets. Values are strings, tables are
JSON. Of paths only the last part is told.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from sdxl_train.data.captions import split_tags

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sdxl_train.data.dataset_config import DatasetOptions, SubsetConfig
    from sdxl_train.data.records import Dataset, ImageRecord
    from sdxl_train.data.sources import Scan

_DROPOUT = (
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
)


def dataset_metadata(scan: Scan, options: DatasetOptions) -> dict[str, str]:
    """Describe the data for the header of a saved file.

    With a dataset file the datasets are listed in ``ss_datasets``; otherwise there is one dataset,
    whose options stand alone. Values are those in effect; where the subsets of a dataset file
    differ, their own entries tell, and the common key has the value of the command line.
    """
    datasets = scan.datasets
    record: dict[str, Any] = {
        "ss_num_train_images": _samples(datasets, is_reg=False),
        "ss_num_validation_images": _samples(scan.validation, is_reg=False),
        "ss_num_reg_images": _samples(datasets, is_reg=True),
        "ss_cache_latents": options.cache_latents,
        "ss_prior_loss_weight": options.prior_loss_weight,
        **{f"ss_{name}": _common(scan, name, getattr(options, name)) for name in _DROPOUT},
        "ss_tag_frequency": json.dumps(_tag_frequencies(datasets)),
    }
    if options.dataset_config is not None:
        record["ss_datasets"] = json.dumps([_dataset(dataset) for dataset in datasets])
        record["ss_dataset_dirs"] = json.dumps(_folders(datasets, (False, True)))
    else:
        record |= _single(datasets[0])
    return {key: str(value) for key, value in record.items()}


def _single(dataset: Dataset) -> dict[str, Any]:
    """Give the keys of a run on ``train_data_dir``."""
    config, subset = dataset.config, dataset.config.subsets[0]
    return {
        "ss_batch_size_per_device": config.batch_size,
        "ss_resolution": config.resolution,
        "ss_color_aug": subset.views.color_aug,
        "ss_flip_aug": subset.views.flip_aug,
        "ss_random_crop": subset.views.random_crop,
        "ss_shuffle_caption": subset.captions.shuffle_caption,
        "ss_enable_bucket": config.buckets.enable_bucket,
        "ss_bucket_no_upscale": config.buckets.bucket_no_upscale,
        "ss_min_bucket_reso": config.buckets.min_bucket_reso,
        "ss_max_bucket_reso": config.buckets.max_bucket_reso,
        "ss_keep_tokens": subset.captions.keep_tokens,
        "ss_dataset_dirs": json.dumps(_folders([dataset], (False,))),
        "ss_reg_dataset_dirs": json.dumps(_folders([dataset], (True,))),
        "ss_bucket_info": json.dumps(_bucket_info(dataset)),
    }


def _dataset(dataset: Dataset) -> dict[str, Any]:
    config = dataset.config
    return {
        "is_dreambooth": not any(subset.metadata_file for subset in config.subsets),
        "batch_size_per_device": config.batch_size,
        "num_train_images": _samples([dataset], is_reg=False),
        "num_reg_images": _samples([dataset], is_reg=True),
        "resolution": config.resolution,
        "enable_bucket": config.buckets.enable_bucket,
        "min_bucket_reso": config.buckets.min_bucket_reso,
        "max_bucket_reso": config.buckets.max_bucket_reso,
        "tag_frequency": _tag_frequencies([dataset]),
        "bucket_info": _bucket_info(dataset),
        "resize_interpolation": _of_all(config.subsets),
        "subsets": [
            _subset(subset, _images_of(dataset, index))
            for index, subset in enumerate(config.subsets)
        ],
    }


def _subset(subset: SubsetConfig, images: Sequence[ImageRecord]) -> dict[str, Any]:
    captions = subset.captions
    return {
        "img_count": len(images),
        "num_repeats": subset.num_repeats,
        "color_aug": subset.views.color_aug,
        "flip_aug": subset.views.flip_aug,
        "random_crop": subset.views.random_crop,
        "shuffle_caption": captions.shuffle_caption,
        "keep_tokens": captions.keep_tokens,
        "keep_tokens_separator": captions.keep_tokens_separator,
        "secondary_separator": captions.secondary_separator or None,
        "enable_wildcard": captions.enable_wildcard,
        "caption_prefix": captions.caption_prefix or None,
        "caption_suffix": captions.caption_suffix or None,
        "resize_interpolation": subset.resize_interpolation,
        **({"image_dir": subset.image_dir.name} if subset.image_dir else {}),
        **{name: getattr(captions, name) for name in _DROPOUT},
        **(
            {"metadata_file": subset.metadata_file.name}
            if subset.metadata_file
            else {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
        ),
    }


def _of_all(subsets: Sequence[SubsetConfig]) -> str | None:
    """Give the interpolation that all subsets share, if they do."""
    values = {subset.resize_interpolation for subset in subsets}
    return values.pop() if len(values) == 1 else None


def _bucket_info(dataset: Dataset) -> dict[str, Any]:
    counts: Counter[tuple[int, int]] = Counter()
    for image in dataset.images:
        counts[image.fit.bucket] += image.repeats
    errors = [abs(image.fit.aspect_error) for image in dataset.images]
    return {
        "buckets": {
            index: {"resolution": size, "count": count}
            for index, (size, count) in enumerate(sorted(counts.items()))
        },
        "mean_img_ar_error": sum(errors) / len(errors),
    }


def _tag_frequencies(datasets: Iterable[Dataset]) -> dict[str, dict[str, int]]:
    """Count the tags of each folder, in lower case; repeats do not count."""
    frequencies: dict[str, Counter[str]] = {}
    for dataset in datasets:
        for image in dataset.images:
            folder = frequencies.setdefault(dataset.subset_of(image).source.name, Counter())
            folder.update(split_tags(image.caption.lower().replace("\n", ",")))
    return {name: dict(counter) for name, counter in frequencies.items()}


def _folders(datasets: Iterable[Dataset], roles: tuple[bool, ...]) -> dict[str, dict[str, int]]:
    """Give repeats and image counts by the names of folders, made unique by `` (2)``."""
    folders: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        for index, subset in enumerate(dataset.config.subsets):
            if subset.is_reg not in roles:
                continue
            name, number = subset.source.name, 2
            while name in folders:
                name, number = f"{subset.source.name} ({number})", number + 1
            folders[name] = {
                "n_repeats": subset.num_repeats,
                "img_count": len(_images_of(dataset, index)),
            }
    return folders


def _images_of(dataset: Dataset, subset: int) -> list[ImageRecord]:
    return [image for image in dataset.images if image.subset == subset]


def _samples(datasets: Iterable[Dataset], *, is_reg: bool) -> int:
    return sum(
        image.repeats for dataset in datasets for image in dataset.images if image.is_reg == is_reg
    )


def _common(scan: Scan, name: str, otherwise: float) -> float:
    """Give an option of captions on which all subsets agree."""
    values = {
        getattr(subset.captions, name)
        for dataset in scan.datasets
        for subset in dataset.config.subsets
    }
    return values.pop() if len(values) == 1 else otherwise
