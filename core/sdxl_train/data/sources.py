"""The scan: every image and caption of the datasets, checked before any work is done.

Only heads of image files are read. Nothing is passed over in silence: a file is used, or listed as
skipped, or a problem.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_train.data.buckets import SizeError, bucket_warnings, check_buckets, fitter
from sdxl_train.data.captions import BALANCE, UNBALANCED, caption_warnings
from sdxl_train.data.dataset_config import DEFAULT
from sdxl_train.data.images import ImageError, ImageHeader
from sdxl_train.data.listing import Remarks, Skipped, list_folder, list_masks
from sdxl_train.data.reading import Reader
from sdxl_train.data.regularization import balanced
from sdxl_train.data.scan_index import ScanIndex
from sdxl_train.data.validation import fixed, held_out, validation_images
from sdxl_train.data.views import split_face
from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sdxl_train.data.buckets import Fit, Size
    from sdxl_train.data.captions import CaptionFile
    from sdxl_train.data.dataset_config import DatasetConfig, SubsetConfig
    from sdxl_train.data.listing import Listing
    from sdxl_train.data.reading import Read


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """An image to train on.

    Attributes:
        path: The file.
        size: Its (width, height), upright.
        caption: Its caption as read, or the class tokens, or empty; with wildcards, all lines.
        has_caption: Whether it has a caption file.
        repeats: Times that it is trained in an epoch.
        is_reg: Whether it is a regularization image.
        subset: Index of its subset in the dataset's configuration.
        fit: How it gets its training size.
        mask: The file of its mask.
    """

    path: Path
    size: Size
    caption: str
    has_caption: bool
    repeats: int
    is_reg: bool
    subset: int
    fit: Fit
    mask: Path | None = None

    @property
    def key(self) -> str:
        """A short name for messages: folder and file."""
        return f"{self.path.parent.name}/{self.path.name}"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset and its images, in the order of its subsets and of the file names."""

    config: DatasetConfig
    images: tuple[ImageRecord, ...]

    def subset_of(self, image: ImageRecord) -> SubsetConfig:
        """Give the configuration of an image's subset."""
        return self.config.subsets[image.subset]


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What there is to train on, and what is wrong, odd or left out."""

    datasets: tuple[Dataset, ...]
    validation: tuple[Dataset, ...]
    """The held-out images, each once, without augmentation. None of them is in ``datasets``."""
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]
    problems: tuple[Problem, ...]
    index: ScanIndex

    def summary(self) -> dict[str, Any]:
        """Describe the scan for ``plan``, in plain JSON values.

        ``images`` are different training images, ``repeats`` the samples of an epoch that they
        make, ``regularization`` the different regularization images in use, ``with_caption`` how
        many of all these have a caption file. ``buckets`` count different images of both sorts.
        ``validation`` counts the images that are held out of all this.
        """
        every = [image for dataset in self.datasets for image in dataset.images]
        training = [image for image in every if not image.is_reg]
        buckets = Counter(image.fit.bucket for image in every)
        return {
            "images": len(training),
            "repeats": sum(image.repeats for image in training),
            "regularization": len(every) - len(training),
            "validation": sum(len(dataset.images) for dataset in self.validation),
            "with_caption": sum(image.has_caption for image in every),
            "skipped": [{"path": str(s.path), "reason": s.reason} for s in self.skipped],
            "buckets": [
                {"resolution": list(size), "images": count}
                for size, count in sorted(buckets.items())
            ],
        }


def scan(
    configs: Sequence[DatasetConfig],
    *,
    bucket_multiple: int,
    place: Callable[[str], str],
    index: ScanIndex | None = None,
    skip_bad: bool = False,
    decode: bool = False,
) -> Scan:
    """Find and check all images and captions.

    Args:
        configs: The datasets.
        bucket_multiple: Sides must be a multiple of this many pixels for the model.
        place: Gives the place of an option by its name, for values that nobody set.
        index: What is known of files from before; it learns what is read. Default: an empty one.
        skip_bad: Leave out images that cannot be used, instead of making problems of them.
        decode: Decode each image that was never decoded before.
    """
    index = index or ScanIndex()
    with Reader(index, decode=decode) as reader:
        scanner = _Scanner(bucket_multiple, place, reader, skip_bad=skip_bad)
        found = [(config, scanner.images(config)) for config in configs]
    held = [held_out(config, images) for config, images in found]
    every = frozenset[Path]().union(*held)
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
        skipped=tuple(scanner.skipped),
        warnings=tuple(dict.fromkeys([*scanner.warnings, *scanner.remarks.lines()])),
        problems=tuple(scanner.problems),
        index=index,
    )


class _Scanner:
    """Collects what the scan of all datasets finds."""

    def __init__(
        self, multiple: int, place: Callable[[str], str], reader: Reader, *, skip_bad: bool
    ) -> None:
        self.multiple = multiple
        self.place = place
        self.reader = reader
        self.skip_bad = skip_bad
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.skipped: list[Skipped] = []
        self.remarks = Remarks()

    def images(self, config: DatasetConfig) -> list[ImageRecord]:
        """Scan one dataset; it has no images where its sizes are not valid."""
        sizes_are_valid = self._check_sizes(config)
        images: list[ImageRecord] = []
        seen: set[tuple[Path, bool]] = set()
        for index, subset in enumerate(config.subsets):
            role = (subset.image_dir.resolve(), subset.is_reg)
            if role in seen:
                self.warnings.append(
                    f"{subset.place}: {subset.image_dir} is named twice in this dataset; "
                    "it is used once"
                )
                continue
            seen.add(role)
            fit = (
                fitter(config.resolution, config.buckets, uncut=subset.views.random_crop)
                if sizes_are_valid
                else None
            )
            images += self._subset(subset, index, fit)
        if config.subsets and all(subset.is_reg for subset in config.subsets):
            message = "has regularization images only, and nothing to train"
            self.problems.append(Problem(place=config.place, message=message))
        return images

    def training(
        self, config: DatasetConfig, images: Sequence[ImageRecord], held: frozenset[Path]
    ) -> Dataset:
        """Give what is trained of a dataset: nothing that any dataset holds out."""
        if config.validation_split and not held:
            self.warnings.append(
                f"{self.origin(config, 'validation_split')}: {config.validation_split:g} of "
                f"{len(images)} images holds out none"
            )
        if held:
            images = [image for image in images if image.path.resolve() not in held]
        used = balanced(images)
        unused = len(images) - len(used)
        if unused:
            regularization = sum(image.is_reg for image in images)
            self.warnings.append(
                f"{unused} of {regularization} regularization images are not used: there are no "
                "more training samples to match"
            )
        return Dataset(config=config, images=tuple(used))

    def all_held_out(self, config: DatasetConfig) -> None:
        """Complain that nothing is left to train."""
        self.problems.append(
            Problem(
                place=self.origin(config, "validation_split"),
                message="holds out every image, and nothing is left to train",
                remedy="hold out less, or add a dataset to train on",
            )
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
        self.problems += problems
        if problems:
            return False
        self.warnings += bucket_warnings(
            config.resolution,
            config.buckets,
            is_default=lambda name: config.origins[name] == DEFAULT,
        )
        return True

    def _subset(
        self, subset: SubsetConfig, index: int, fit: Callable[[Size], Fit] | None
    ) -> list[ImageRecord]:
        try:
            listing = list_folder(subset.image_dir, subset.caption_extensions, self.remarks)
        except OSError as error:
            message = f"{subset.image_dir} cannot be read: {error.strerror}"
            self.problems.append(Problem(place=subset.place, message=message))
            return []
        self.skipped += listing.skipped
        self._check_listing(subset, listing)
        masks = self._masks(subset, listing)
        read = self.reader.read(listing.images, listing.captions, masks)
        records = [record for entry in read if (record := self._record(entry, subset, index, fit))]
        if listing.images and not records and self.skip_bad:
            message = f"no image in {subset.image_dir} can be used, they are all left out"
            self.problems.append(Problem(place=subset.place, message=message))
        captioned = [record.caption for record in records if record.has_caption]
        if len(captioned) < len(records):
            used = f"the class tokens {subset.class_tokens!r}" if subset.class_tokens else "nothing"
            self.warnings.append(
                f"{subset.image_dir}: {len(records) - len(captioned)} of {len(records)} images "
                f"have no caption file; their caption is {used}"
            )
        self.warnings += [
            f"{subset.image_dir}: {warning}"
            for warning in caption_warnings(captioned, subset.captions)
        ]
        return records

    def _check_listing(self, subset: SubsetConfig, listing: Listing) -> None:
        if not listing.images:
            self.problems.append(
                Problem(
                    place=subset.place,
                    message=f"{subset.image_dir} holds no images ({listing.contents})",
                    remedy=listing.advice,
                )
            )
        elif listing.other_captions and not any(listing.captions):
            origin = subset.origins["caption_extension"]
            ending = listing.other_captions[0].suffix
            self.problems.append(
                Problem(
                    place=self.place("caption_extension") if origin == DEFAULT else origin,
                    message=f"no image in {subset.image_dir} has a caption file "
                    f"({' or '.join(subset.caption_extensions)}), but there is "
                    f"{listing.other_captions[0].name}",
                    remedy=f"use --caption_extension {ending}",
                )
            )

    def _record(
        self,
        read: Read,
        subset: SubsetConfig,
        index: int,
        fit: Callable[[Size], Fit] | None,
    ) -> ImageRecord | None:
        text = subset.class_tokens or ""
        if isinstance(read.caption, Problem):
            self.problems.append(read.caption)
        elif read.caption is not None:
            text = self._caption(read.caption, read.caption_path or read.path, subset)
        if isinstance(read.header, ImageError):
            self._bad_image(read.path, str(read.header))
            return None
        chosen = self._fit(read.path, read.header, fit)
        if chosen is None or not self._mask_fits(read, subset):
            return None
        if subset.views.face_crop_aug_range and split_face(read.path.stem)[1] is None:
            self.remarks.add("no face in the name (_X_Y_W_H), cropped at the centre", read.path)
        return ImageRecord(
            path=read.path,
            size=read.header.size,
            caption=text,
            has_caption=read.caption is not None,
            repeats=subset.num_repeats,
            is_reg=subset.is_reg,
            subset=index,
            fit=chosen,
            mask=read.mask_path,
        )

    def _caption(self, caption: CaptionFile, path: Path, subset: SubsetConfig) -> str:
        for remark in caption.remarks:
            self.remarks.add(f"caption {remark}", path)
        if not subset.captions.enable_wildcard:
            if len(caption.lines) > 1:
                remark = "caption more than one line, only the first is used (enable_wildcard)"
                self.remarks.add(remark, path)
            return caption.text
        if caption.bad_brace:
            line, column = caption.bad_brace
            place = f"{path}:{line}:{column}"
            self.problems.append(Problem(place=place, message=UNBALANCED, remedy=BALANCE))
        return "\n".join(caption.lines)

    def _masks(self, subset: SubsetConfig, listing: Listing) -> list[Path | None]:
        """Give the mask of each image, if the subset has any."""
        if subset.mask_dir is None:
            return [None] * len(listing.images)
        try:
            masks, skipped = list_masks(subset.mask_dir, listing.images, self.remarks)
        except OSError as error:
            message = f"{subset.mask_dir} cannot be read: {error.strerror}"
            self.problems.append(Problem(place=subset.place, message=message))
            return [None] * len(listing.images)
        self.skipped += skipped
        bare = [
            image.name for image, mask in zip(listing.images, masks, strict=True) if mask is None
        ]
        if bare:
            more = f" and {len(bare) - 5} more" if len(bare) > 5 else ""
            self.problems.append(
                Problem(
                    place=subset.origins["conditioning_data_dir"],
                    message=f"{len(bare)} of {len(masks)} images in {subset.image_dir} have no "
                    f"mask in {subset.mask_dir}: {', '.join(bare[:5])}{more}",
                    remedy="a mask has the name of its image; images without one go into a subset "
                    "of their own",
                )
            )
        return masks

    def _mask_fits(self, read: Read, subset: SubsetConfig) -> bool:
        """Check the mask against its image, whose head is good."""
        header = read.header
        assert isinstance(header, ImageHeader)
        if subset.alpha_mask:
            if not header.transparent:
                self.remarks.add("no alpha channel, so all of it counts (alpha_mask)", read.path)
        elif header.transparent:
            self.remarks.add("transparent, laid on white", read.path)
        if read.mask is None:
            return True
        assert read.mask_path is not None
        if isinstance(read.mask, ImageError):
            self._bad_image(read.mask_path, str(read.mask))
            return False
        if read.mask.size != header.size:
            self.remarks.add("a mask of another size than its image, resized", read.mask_path)
        if not read.mask.grey:
            self.remarks.add("a mask in colour, its red channel counts", read.mask_path)
        return True

    def _fit(
        self, path: Path, header: ImageHeader, fit: Callable[[Size], Fit] | None
    ) -> Fit | None:
        if header.misnamed:
            self.remarks.add(f"in truth {header.format}, read as that", path)
        width, height = header.size
        if min(width, height) < self.multiple:
            self._bad_image(path, f"{width}x{height} is less than {self.multiple} pixels on a side")
            return None
        if fit is None:
            return None
        try:
            chosen = fit(header.size)
        except SizeError as error:
            self._bad_image(path, str(error))
            return None
        if chosen.resized[0] > 2 * width:
            self.remarks.add("enlarged to more than twice its size", path)
        return chosen

    def _bad_image(self, path: Path, message: str) -> None:
        if self.skip_bad:
            self.skipped.append(Skipped(path=path, reason=message))
            self.remarks.add("left out, it cannot be used (--on_bad_image skip)", path)
            return
        remedy = "replace or remove the file, or leave such files out with --on_bad_image skip"
        self.problems.append(Problem(place=str(path), message=message, remedy=remedy))
