"""Options of datasets that contradict one another, or would have no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from sdxl_train.data.captions import BALANCE, UNBALANCED, bad_brace
from sdxl_train.data.dataset_file import CALLED_HERE, DatasetTable
from sdxl_train.data.dataset_options import DEFAULT
from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pydantic import BaseModel

    from sdxl_train.data.buckets import BucketOptions
    from sdxl_train.data.dataset_config import DatasetConfig, SubsetConfig
    from sdxl_train.data.dataset_file import DatasetFile
    from sdxl_train.data.dataset_options import DatasetOptions
    from sdxl_train.data.layers import Layer
    from sdxl_train.toml_files import KeyPath

ConfigT = TypeVar("ConfigT", "DatasetConfig", "SubsetConfig")


def subset_problems(
    subset: SubsetConfig, options: DatasetOptions, place: Callable[[str], str]
) -> Iterator[Problem]:
    """Yield what is wrong with the options of a subset among themselves."""
    if options.caches_latents:
        yield from _frozen(subset, subset.views.unrepeatable, place("cache_latents"), "")
    if options.caches_text:
        keeps = " (caption_dropout_rate may stay)"
        yield from _frozen(
            subset, subset.captions.unrepeatable, place("cache_text_encoder_outputs"), keeps
        )
    yield from _caption_problems(subset)
    if subset.mask_dir is not None and subset.alpha_mask:
        yield Problem(
            place=subset.origins["alpha_mask"],
            message=f"the masks of {subset.source} would be its alpha channels, and those in "
            f"{subset.mask_dir} ({subset.origins['conditioning_data_dir']})",
            remedy="leave out one of the two",
        )
    if subset.mask_dir is not None and not options.masked_loss:
        yield Problem(
            place=subset.origins["conditioning_data_dir"],
            message="has no effect without masked_loss",
            remedy="add --masked_loss, or leave it out",
        )


def _caption_problems(subset: SubsetConfig) -> Iterator[Problem]:
    captions = subset.captions
    secondary, separator = captions.secondary_separator, captions.caption_separator
    if secondary and separator in secondary:
        yield Problem(
            place=subset.origins["secondary_separator"],
            message=f"{secondary!r} has the caption_separator {separator!r} in it, which parts "
            "tags first",
            remedy="choose another one, such as ;;;",
        )
    if captions.enable_wildcard:
        texts = {
            "class_tokens": subset.class_tokens or "",
            "caption_prefix": captions.caption_prefix,
            "caption_suffix": captions.caption_suffix,
        }
        for name, text in texts.items():
            if column := bad_brace(text):
                yield Problem(
                    place=subset.origins[name],
                    message=f"{text!r}, column {column}: {UNBALANCED}",
                    remedy=BALANCE,
                )


def spelling_problems(options: DatasetOptions, place: Callable[[str], str]) -> Iterator[Problem]:
    """Yield an option that is given under both of its names."""
    if {"caption_extension", "caption_extention"} <= options.model_fields_set:
        yield Problem(
            place=place("caption_extention"),
            message=f"given together with {place('caption_extension')}, which is the same",
            remedy="leave it out",
        )


def face_crop_problems(
    subsets: Sequence[SubsetConfig], buckets: BucketOptions, bucket_origin: str
) -> Iterator[Problem]:
    """Yield the subsets whose crops around faces have no effect because of buckets."""
    for subset in subsets:
        if subset.views.face_crop_aug_range and buckets.enable_bucket:
            yield Problem(
                place=subset.origins["face_crop_aug_range"],
                message=f"has no effect with enable_bucket ({bucket_origin})",
                remedy="leave out one of the two",
            )


def mask_problems(
    datasets: Sequence[DatasetConfig], options: DatasetOptions, place: Callable[[str], str]
) -> Iterator[Problem]:
    """Yield options of masks that have no mask to act on."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    # A folder that is named but not there is a problem already.
    names_folder = any(subset.origins["conditioning_data_dir"] != DEFAULT for subset in subsets)
    if not subsets or names_folder or any(subset.alpha_mask for subset in subsets):
        return
    for name in ("masked_loss", "masked_loss_normalize"):
        if getattr(options, name):
            yield Problem(
                place=place(name),
                message="has no effect: no subset has masks",
                remedy="name their folder as conditioning_data_dir, or set alpha_mask, or leave "
                "it out",
            )


def style_problems(subsets: Sequence[SubsetConfig], place: str) -> Iterator[Problem]:
    """Yield that a dataset has images from folders beside those from metadata files."""
    with_file = [subset for subset in subsets if subset.metadata_file]
    if with_file and len(with_file) < len(subsets):
        yield Problem(
            place=place,
            message=f"some subsets have a metadata_file ({with_file[0].place}), others have none",
            remedy="put them into [[datasets]] of their own",
        )


def metadata_problems(layer: Layer) -> Iterator[Problem]:
    """Yield keys of a subset's own that act on folders of images with caption files."""
    for name in ("caption_extension", "class_tokens", "cache_info", "is_reg"):
        if getattr(layer.table, name) is not None:
            yield Problem(
                place=layer.place(name),
                message="does not go with metadata_file, which names images and captions itself",
                remedy="leave out one of the two",
            )


def idle_remarks(datasets: Sequence[DatasetConfig]) -> Iterator[str]:
    """Yield options without an effect of their own."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    places = [s.origins["cache_info"] for s in subsets if s.values["cache_info"]]
    for place in dict.fromkeys(places):
        yield (
            f"{place}: sizes and captions are kept for the next start in any case, in the user's "
            "cache folder, and read again where a file has changed; nothing is written beside the "
            "images"
        )
    moves_tags = "shuffle_caption, caption_tag_dropout_rate or token_warmup_step"
    yield from _idle(
        subsets, "token_warmup_min", lambda s: s.captions.token_warmup_step, "token_warmup_step"
    )
    yield from _idle(
        subsets,
        "keep_tokens",
        lambda s: s.captions.changes_tags or not s.captions.keep_tokens,
        moves_tags,
    )
    for name in ("caption_extension", "class_tokens"):
        yield from _idle(subsets, name, lambda s: not s.metadata_file, "folders of caption files")
    yield from _idle(datasets, "validation_seed", lambda d: d.validation_split, "validation_split")


def _idle(
    configs: Sequence[ConfigT], name: str, acts: Callable[[ConfigT], object], what: str
) -> Iterator[str]:
    """Yield the places that set an option for nothing that it acts on."""
    places = {config.origins[name]: False for config in configs}
    for config in configs:
        places[config.origins[name]] |= bool(acts(config))
    for place, is_used in places.items():
        if place != DEFAULT and not is_used:
            yield f"{place}: has no effect without {what}"


def shadowed_remarks(
    datasets: Sequence[DatasetConfig], file: DatasetFile, place: Callable[[KeyPath], str]
) -> Iterator[str]:
    """Yield keys of a dataset file that count nowhere, because all tables inside set their own."""
    configs: list[DatasetConfig | SubsetConfig] = [*datasets]
    configs += [subset for dataset in datasets for subset in dataset.subsets]
    used = {origin for config in configs for origin in config.origins.values()}
    tables: list[tuple[KeyPath, BaseModel]] = [(("general",), file.general)]
    tables += [(("datasets", number), table) for number, table in enumerate(file.datasets)]
    for key, table in tables:
        for name in sorted(table.model_fields_set - {"subsets", "network_multiplier"}):
            if place((*key, name)) not in used:
                yield f"{place((*key, name))}: has no effect, every table inside has its own"


def overridden_remarks(
    datasets: Sequence[DatasetConfig], options: DatasetOptions, place: Callable[[str], str]
) -> Iterator[str]:
    """Yield options of the command line that count nowhere, because a dataset file sets them."""
    configs: list[DatasetConfig | SubsetConfig] = [*datasets]
    configs += [subset for dataset in datasets for subset in dataset.subsets]
    for option in sorted(options.model_fields_set):
        name = CALLED_HERE.get(option, option)
        origins = [config.origins[name] for config in configs if name in config.origins]
        if name in DatasetTable.model_fields and origins and place(option) not in origins:
            yield f"{place(option)} has no effect: the dataset file sets it ({origins[0]})"


def warmup_remarks(datasets: Iterable[DatasetConfig], total_steps: int) -> Iterator[str]:
    """Yield where the warm-up of tags lasts longer than the run."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    late = {
        subset.origins["token_warmup_step"]: subset.captions.token_warmup_step
        for subset in subsets
        if subset.captions.token_warmup_step > total_steps
    }
    for place, steps in late.items():
        yield (
            f"{place}: the run ends after {total_steps} of its {steps:g} steps, before all tags "
            "are trained"
        )


def _frozen(
    subset: SubsetConfig, names: Sequence[str], cache: str, keeps: str
) -> Iterator[Problem]:
    """Yield what a cache would make the same each time."""
    for name in names:
        yield Problem(
            place=subset.origins[name],
            message=f"{name} of {subset.source} would be frozen by {cache}",
            remedy=f"leave out {name} or {cache.lstrip('-')}{keeps}",
        )
