"""The scan of one subset: its folder, each image with its caption and mask."""

from __future__ import annotations

from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from sdxl_train.data.annotations import read_annotations
from sdxl_train.data.buckets import SizeError
from sdxl_train.data.captions import BALANCE, UNBALANCED, caption_warnings
from sdxl_train.data.dataset_options import DEFAULT
from sdxl_train.data.images import ImageError, ImageHeader
from sdxl_train.data.listing import Listing, list_folder, list_masks
from sdxl_train.data.records import ImageRecord
from sdxl_train.data.views import split_face
from sdxl_train.errors import Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from sdxl_train.data.annotations import Annotation
    from sdxl_train.data.buckets import Fit, Size
    from sdxl_train.data.captions import CaptionFile
    from sdxl_train.data.dataset_config import SubsetConfig
    from sdxl_train.data.findings import Findings
    from sdxl_train.data.reading import Read, Reader


class SubsetScan:
    """Reads one subset.

    Args:
        subset: Its configuration.
        index: Its index in the dataset.
        fit: Gives an image its training size; None where the dataset's sizes are not valid.
        multiple: Shortest side of an image that can be trained, in pixels.
        reader: Reads the files.
        findings: Gets what is wrong, odd or left out.
        place: Gives the place of an option by its name, for values that nobody set.
    """

    def __init__(
        self,
        subset: SubsetConfig,
        *,
        index: int,
        fit: Callable[[Size], Fit] | None,
        multiple: int,
        reader: Reader,
        findings: Findings,
        place: Callable[[str], str],
    ) -> None:
        self.subset = subset
        self.index = index
        self.fit = fit
        self.multiple = multiple
        self.reader = reader
        self.findings = findings
        self.place = place
        self.annotations: dict[Path, Annotation] = {}
        self._judged = cache(self._judge)

    def records(self) -> list[ImageRecord]:
        """Give the images that can be used, in the order of their names."""
        listings = self._annotated() if self.subset.metadata_file else self._listed()
        num_images = sum(len(listing.images) for listing in listings)
        masks = iter(self._masks([name for listing in listings for name in listing.images]))
        records = []
        for listing in listings:
            self.findings.skipped += listing.skipped
            read = self.reader.read(
                listing.folder,
                listing.images,
                listing.captions,
                list(islice(masks, len(listing.images))),
                self.subset.mask_dir,
            )
            records += [record for entry in read if (record := self._record(entry))]
        if num_images and not records and self.findings.skip_bad:
            message = f"no image in {self.subset.source} can be used, they are all left out"
            self.findings.problem(self.subset.place, message)
        self._check_captions(records)
        return records

    def _listed(self) -> list[Listing]:
        """List the images and caption files of the subset's folder."""
        subset = self.subset
        assert subset.image_dir is not None
        try:
            listing = list_folder(
                subset.image_dir, subset.caption_extensions, self.findings.remarks
            )
        except OSError as error:
            message = f"{subset.image_dir} cannot be read: {error.strerror}"
            self.findings.problem(subset.place, message)
            return []
        for name in listing.astray:
            self._refuse_link(listing, name)
        self._check_listing(listing)
        return [listing]

    def _refuse_link(self, listing: Listing, name: str) -> None:
        """Leave out an image whose file, or that of its caption, lies elsewhere."""
        path = listing.folder / name
        is_used = False
        for names in (listing.images, listing.captions):
            while name in names:
                at = names.index(name)
                del listing.images[at], listing.captions[at]
                is_used = True
        if is_used:
            self.findings.bad_image(path, f"is a link out of the folder, to {path.readlink()}")

    def _annotated(self) -> list[Listing]:
        """List the images that the subset's metadata file names, folder by folder."""
        subset = self.subset
        assert subset.metadata_file is not None
        try:
            annotations = read_annotations(
                subset.metadata_file,
                subset.image_dir,
                subset.captions.caption_separator,
                self.findings,
            )
        except UserError as error:
            self.findings.problems += error.problems
            return []
        self.annotations = {annotation.path: annotation for annotation in annotations}
        listings: dict[Path, Listing] = {}
        for path in self.annotations:
            listing = listings.setdefault(path.parent, Listing(folder=path.parent))
            listing.images.append(path.name)
            listing.captions.append(None)
        return list(listings.values())

    def _check_listing(self, listing: Listing) -> None:
        subset = self.subset
        if not listing.images:
            self.findings.problem(
                subset.place,
                f"{listing.folder} holds no images ({listing.contents})",
                listing.advice,
            )
        elif listing.other_captions and not any(listing.captions):
            origin = subset.origins["caption_extension"]
            other = listing.other_captions[0]
            self.findings.problem(
                self.place("caption_extension") if origin == DEFAULT else origin,
                f"no image in {listing.folder} has a caption file "
                f"({' or '.join(subset.caption_extensions)}), but there is {other}",
                f"use --caption_extension {other[other.rindex('.') :]}",
            )

    def _check_captions(self, records: Sequence[ImageRecord]) -> None:
        subset = self.subset
        captioned = [record.caption for record in records if record.has_caption]
        bare = [record.path for record in records if not record.has_caption]
        if self.findings.strict_captions and not subset.is_reg:
            for path in bare:
                remedy = "write one, or drop --strict_captions"
                self.findings.problem(str(path), "has no caption", remedy)
        elif bare:
            used = f"the class tokens {subset.class_tokens!r}" if subset.class_tokens else "nothing"
            remark = (
                f"{len(bare)} of {len(records)} images have no "
                f"caption{'' if subset.metadata_file else ' file'}; their caption is {used}"
            )
            self.findings.captions(subset.source, [remark])
        self.findings.captions(subset.source, caption_warnings(captioned, subset.captions))

    def _record(self, read: Read) -> ImageRecord | None:
        subset, text = self.subset, self.subset.class_tokens or ""
        annotation = self.annotations.get(read.path) if self.annotations else None
        caption = read.caption if annotation is None else annotation.caption
        if isinstance(caption, Problem):
            self.findings.problems.append(caption)
        elif caption is not None:
            text = self._caption(caption, read, annotation)
        if isinstance(read.header, ImageError):
            self.findings.bad_image(read.path, str(read.header))
            return None
        if annotation and annotation.size not in (None, read.header.size):
            remark = "its image_size in the metadata file is not that of the image, which counts"
            self.findings.remarks.add(remark, read.path)
        judged = self._judged(read.header)
        for remark, detail in judged.remarks:
            self.findings.remarks.add(remark, read.path, detail)
        if judged.fault:
            self.findings.bad_image(read.path, judged.fault)
        if judged.fit is None or (read.mask is not None and not self._mask_fits(read, read.mask)):
            return None
        if subset.views.face_crop_aug_range and split_face(read.path.stem)[1] is None:
            remark = "no face in the name (_X_Y_W_H), cropped at the centre"
            self.findings.remarks.add(remark, read.path)
        # In the order of its fields: names take twice as long, and there may be 100 000.
        return ImageRecord(
            read.folder,
            read.names[0],
            read.num_bytes,
            read.header.size,
            text,
            caption is not None,
            subset.num_repeats,
            subset.is_reg,
            self.index,
            judged.fit,
            read.mask_path if read.mask else None,
        )

    def _caption(self, caption: CaptionFile, read: Read, annotation: Annotation | None) -> str:
        for remark in caption.remarks:
            self.findings.poor_caption(read.caption_path or read.path, remark)
        if not self.subset.captions.enable_wildcard:
            if "\n" in caption.content:
                remark = "caption more than one line, only the first is used (enable_wildcard)"
                self.findings.remarks.add(remark, read.caption_path or read.path)
            return caption.text
        if caption.bad_brace:
            line, column = caption.bad_brace
            where = f"{annotation.place}: caption" if annotation else str(read.caption_path)
            self.findings.problem(f"{where}:{line}:{column}", UNBALANCED, BALANCE)
        return caption.content

    def _masks(self, images: Sequence[str]) -> Sequence[str | None]:
        """Give the mask of each image, if the subset has any."""
        subset = self.subset
        if subset.mask_dir is None:
            return [None] * len(images)
        try:
            masks, skipped = list_masks(subset.mask_dir, images, self.findings.remarks)
        except OSError as error:
            message = f"{subset.mask_dir} cannot be read: {error.strerror}"
            self.findings.problem(subset.place, message)
            return [None] * len(images)
        self.findings.skipped += skipped
        bare = [image for image, mask in zip(images, masks, strict=True) if mask is None]
        if bare:
            more = f" and {len(bare) - 5} more" if len(bare) > 5 else ""
            self.findings.problem(
                subset.origins["conditioning_data_dir"],
                f"{len(bare)} of {len(masks)} images in {subset.source} have no "
                f"mask in {subset.mask_dir}: {', '.join(bare[:5])}{more}",
                "a mask has the name of its image; images without one go into a subset "
                "of their own",
            )
        return masks

    def _mask_fits(self, read: Read, mask: ImageHeader | ImageError) -> bool:
        """Check the mask of an image that can be used."""
        assert read.mask_path is not None
        assert isinstance(read.header, ImageHeader)
        if isinstance(mask, ImageError):
            self.findings.bad_image(read.mask_path, str(mask))
            return False
        remarks = self.findings.remarks
        if mask.size != read.header.size:
            remarks.add("a mask of another size than its image, resized", read.mask_path)
        if not mask.grey:
            remarks.add("a mask in colour, its red channel counts", read.mask_path)
        return True

    def _judge(self, header: ImageHeader) -> _Judged:
        """Find the training size of images with this head, and what is odd about them."""
        (width, height), remarks = header.size, []
        if header.misnamed:
            remarks.append((f"in truth {header.format}, read as that", ""))
        if header.animated:
            remarks.append(("animated, only its first picture is used", ""))
        if min(width, height) < self.multiple:
            fault = f"{width}x{height} is less than {self.multiple} pixels on a side"
            return _Judged(fault=fault, remarks=tuple(remarks))
        if self.fit is None:
            return _Judged(remarks=tuple(remarks))
        try:
            fit = self.fit(header.size)
        except SizeError as error:
            return _Judged(fault=str(error), remarks=tuple(remarks))
        if self.subset.alpha_mask and not header.transparent:
            remarks.append(("no alpha channel, so all of it counts (alpha_mask)", ""))
        elif header.transparent and not self.subset.alpha_mask:
            remarks.append(("transparent, laid on white", ""))
        return _Judged(fit, remarks=(*remarks, *self._remarks_on_fit(header.size, fit)))

    def _remarks_on_fit(self, size: Size, fit: Fit) -> Iterator[tuple[str, str]]:
        views = self.subset.views
        if fit.is_large_for(size):
            yield "enlarged to more than twice its size", f"{fit.scale(size):.1f} times"
        if fit.is_extreme_for(size) and not (views.random_crop or views.face_crop_aug_range):
            detail = f"{size[0]}x{size[1]}, {fit.crop_share:.0%} cut off"
            yield "long and narrow, or more than 40 % of it is cut off", detail


class _Judged(NamedTuple):
    """What images with one head are trained at, or why they cannot be; remarks with details."""

    fit: Fit | None = None
    fault: str = ""
    remarks: tuple[tuple[str, str], ...] = ()
