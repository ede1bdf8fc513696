"""The scan: every image and caption of the datasets, checked before any work is done.

Only heads of image files are read. Nothing is passed over in silence: a file is used, or listed as
skipped, or a problem.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_train.data.buckets import bucket_warnings, check_buckets, fitter
from sdxl_train.data.dataset_options import DEFAULT
from sdxl_train.data.duplicates import find_duplicates
from sdxl_train.data.findings import Findings
from sdxl_train.data.reading import Reader
from sdxl_train.data.records import Dataset
from sdxl_train.data.regularization import balanced
from sdxl_train.data.scan_index import ScanIndex
from sdxl_train.data.subset_scan import SubsetScan
from sdxl_train.data.validation import fixed, held_out, validation_images

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sdxl_train.data.dataset_config import DatasetConfig
    from sdxl_train.data.findings import Skipped
    from sdxl_train.data.records import ImageRecord
    from sdxl_train.errors import Problem


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What there is to train on, and what is wrong, odd or left out."""

    datasets: tuple[Dataset, ...]
    validation: tuple[Dataset, ...]
    """The held-out images, each once, without augmentation. None of them is in ``datasets``."""
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]
    problems: tuple[Problem, ...]
    duplicates: tuple[tuple[Path, ...], ...]
    """Files with the same content, in groups."""
    index: ScanIndex

    @property
    def largest_resolution(self) -> tuple[int, int]:
        """The (width, height) of most pixels that images are trained at."""
        resolutions = [dataset.config.resolution for dataset in self.datasets]
        return max(resolutions, key=lambda size: size[0] * size[1])


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Hold off the garbage collector, which would go through all that is found again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_collector_paused()
def scan(
    configs: Sequence[DatasetConfig],
    *,
    bucket_multiple: int,
    place: Callable[[str], str],
    index: ScanIndex | None = None,
    skip_bad: bool = False,
    strict_captions: bool = False,
    decode: bool = False,
) -> Scan:
    """Find and check all images and captions.

    Args:
        configs: The datasets.
        bucket_multiple: Sides must be a multiple of this many pixels for the model.
        place: Gives the place of an option by its name, for values that nobody set.
        index: What is known of files from before; it learns what is read. Default: an empty one.
        skip_bad: Leave out images that cannot be used, instead of making problems of them.
        strict_captions: Make problems of captions that are missing, empty or not UTF-8.
        decode: Decode each image that was never decoded before.
    """
    index = index or ScanIndex()
    findings = Findings(skip_bad=skip_bad, strict_captions=strict_captions)
    scanner = _Scanner(bucket_multiple, place, Reader(index, decode=decode), findings)
    found = [(config, scanner.images(config)) for config in configs]
    duplicates = find_duplicates((image for _, images in found for image in images), index)
    if duplicates:
        findings.warnings.append(_duplicates_remark(duplicates))
    held = [held_out(config, images) for config, images in found]
    every = frozenset[Path]().union(*held)
    findings.warnings += _leaks(duplicates, every)
    training = [scanner.training(config, images, every) for config, images in found]
    if every and not any(dataset.images for dataset in training):
        scanner.all_held_out(found[0][0])
    return Scan(
        datasets=tuple(dataset for dataset in training if dataset.images or not every),
        validation=tuple(
            Dataset(config=fixed(config), images=tuple(validation_images(images, own)))
            for (config, images), own in zip(found, held, strict=True)
            if own
        ),
        # Several datasets may find the same of one folder.
        skipped=tuple(dict.fromkeys(findings.skipped)),
        warnings=tuple(
            dict.fromkeys(
                [*findings.caption_lines(), *findings.warnings, *findings.remarks.lines()]
            )
        ),
        problems=tuple(dict.fromkeys(findings.problems)),
        duplicates=duplicates,
        index=index,
    )


def _duplicates_remark(groups: Sequence[Sequence[Path]]) -> str:
    copies = sum(len(group) - 1 for group in groups)
    shown = "; ".join(map(_group, groups[:5]))
    more = f"; and {len(groups) - 5} more groups" if len(groups) > 5 else ""
    files = "1 image is a copy" if copies == 1 else f"{copies} images are copies"
    return f"{files} of another, with the same content: {shown}{more}"


def _group(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return " = ".join(map(str, paths[:5])) + more


def _leaks(duplicates: Sequence[Sequence[Path]], held: frozenset[Path]) -> Iterator[str]:
    """Say where an image is held out of training, and a copy of it is trained."""
    for group in duplicates if held else ():
        out = [path for path in group if path.resolve() in held]
        if 0 < len(out) < len(group):
            trained = next(path for path in group if path not in out)
            yield (
                f"{out[0]} is held out to validate on, but {trained} with the same content is "
                "trained: remove one of them"
            )


class _Scanner:
    """Scans datasets one after the other.

    Args:
        multiple: Sides must be a multiple of this many pixels for the model.
        place: Gives the place of an option by its name, for values that nobody set.
        reader: Reads the files.
        findings: Gets what is wrong, odd or left out.
    """

    def __init__(
        self, multiple: int, place: Callable[[str], str], reader: Reader, findings: Findings
    ) -> None:
        self.multiple = multiple
        self.place = place
        self.reader = reader
        self.findings = findings

    def images(self, config: DatasetConfig) -> list[ImageRecord]:
        """Scan one dataset; it has no images where its sizes are not valid."""
        sizes_are_valid = self._check_sizes(config)
        images: list[ImageRecord] = []
        seen: set[tuple[Path, bool]] = set()
        for index, subset in enumerate(config.subsets):
            role = (subset.source.resolve(), subset.is_reg)
            if role in seen:
                self.findings.warnings.append(
                    f"{subset.place}: {subset.source} is named twice in this dataset; "
                    "it is used once"
                )
                continue
            seen.add(role)
            fit = (
                fitter(config.resolution, config.buckets, uncut=subset.views.random_crop)
                if sizes_are_valid
                else None
            )
            images += SubsetScan(
                subset,
                index=index,
                fit=fit,
                multiple=self.multiple,
                reader=self.reader,
                findings=self.findings,
                place=self.place,
            ).records()
        if config.subsets and all(subset.is_reg for subset in config.subsets):
            self.findings.problem(
                config.place, "has regularization images only, and nothing to train"
            )
        return images

    def training(
        self, config: DatasetConfig, images: Sequence[ImageRecord], held: frozenset[Path]
    ) -> Dataset:
        """Give what is trained of a dataset: nothing that any dataset holds out."""
        if config.validation_split and not held:
            self.findings.warnings.append(
                f"{self.origin(config, 'validation_split')}: {config.validation_split:g} of "
                f"{len(images)} images holds out none"
            )
        if held:
            images = [image for image in images if image.path.resolve() not in held]
        used = balanced(images)
        unused = len(images) - len(used)
        if unused:
            regularization = sum(image.is_reg for image in images)
            self.findings.warnings.append(
                f"{unused} of {regularization} regularization images are not used: there are no "
                "more training samples to match"
            )
        return Dataset(config=config, images=tuple(used))

    def all_held_out(self, config: DatasetConfig) -> None:
        """Complain that nothing is left to train."""
        self.findings.problem(
            self.origin(config, "validation_split"),
            "holds out every image, and nothing is left to train",
            "hold out less, or add a dataset to train on",
        )

    def origin(self, config: DatasetConfig, name: str) -> str:
        """Give the place of an option of a dataset."""
        origin = config.origins[name]
        return self.place(name) if origin == DEFAULT else origin

    def _check_sizes(self, config: DatasetConfig) -> bool:
        problems = check_buckets(
            config.resolution,
            config.buckets,
            multiple=self.multiple,
            place=partial(self.origin, config),
        )
        self.findings.problems += problems
        if problems:
            return False
        self.findings.warnings += bucket_warnings(
            config.resolution,
            config.buckets,
            is_default=lambda name: config.origins[name] == DEFAULT,
            place=partial(self.origin, config),
        )
        return True
