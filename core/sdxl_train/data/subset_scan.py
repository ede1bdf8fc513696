"""The scan of one subset: its folder, each image with its caption and mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train.data.buckets import SizeError
from sdxl_train.data.captions import BALANCE, UNBALANCED, caption_warnings
from sdxl_train.data.dataset_options import DEFAULT
from sdxl_train.data.images import ImageError, ImageHeader
from sdxl_train.data.listing import list_folder, list_masks
from sdxl_train.data.records import ImageRecord
from sdxl_train.data.views import split_face
from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sdxl_train.data.buckets import Fit, Size
    from sdxl_train.data.captions import CaptionFile
    from sdxl_train.data.dataset_config import SubsetConfig
    from sdxl_train.data.findings import Findings
    from sdxl_train.data.listing import Listing
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

    def records(self) -> list[ImageRecord]:
        """Give the images that can be used, in the order of their names."""
        subset = self.subset
        try:
            listing = list_folder(
                subset.image_dir, subset.caption_extensions, self.findings.remarks
            )
        except OSError as error:
            message = f"{subset.image_dir} cannot be read: {error.strerror}"
            self.findings.problem(subset.place, message)
            return []
        self.findings.skipped += listing.skipped
        self._check_listing(listing)
        read = self.reader.read(
            subset.image_dir,
            listing.images,
            listing.captions,
            self._masks(listing),
            subset.mask_dir,
        )
        records = [record for entry in read if (record := self._record(entry))]
        if listing.images and not records and self.findings.skip_bad:
            message = f"no image in {subset.image_dir} can be used, they are all left out"
            self.findings.problem(subset.place, message)
        self._check_captions(records)
        return records

    def _check_listing(self, listing: Listing) -> None:
        subset = self.subset
        if not listing.images:
            self.findings.problem(
                subset.place,
                f"{subset.image_dir} holds no images ({listing.contents})",
                listing.advice,
            )
        elif listing.other_captions and not any(listing.captions):
            origin = subset.origins["caption_extension"]
            other = listing.other_captions[0]
            self.findings.problem(
                self.place("caption_extension") if origin == DEFAULT else origin,
                f"no image in {subset.image_dir} has a caption file "
                f"({' or '.join(subset.caption_extensions)}), but there is {other}",
                f"use --caption_extension {other[other.rindex('.') :]}",
            )

    def _check_captions(self, records: Sequence[ImageRecord]) -> None:
        subset = self.subset
        captioned = [record.caption for record in records if record.has_caption]
        if len(captioned) < len(records):
            used = f"the class tokens {subset.class_tokens!r}" if subset.class_tokens else "nothing"
            self.findings.warnings.append(
                f"{subset.image_dir}: {len(records) - len(captioned)} of {len(records)} images "
                f"have no caption file; their caption is {used}"
            )
        self.findings.warnings += [
            f"{subset.image_dir}: {warning}"
            for warning in caption_warnings(captioned, subset.captions)
        ]

    def _record(self, read: Read) -> ImageRecord | None:
        subset = self.subset
        path, text = read.path, subset.class_tokens or ""
        if isinstance(read.caption, Problem):
            self.findings.problems.append(read.caption)
        elif read.caption is not None:
            text = self._caption(read.caption, read)
        if isinstance(read.header, ImageError):
            self.findings.bad_image(path, str(read.header))
            return None
        chosen = self._fit(path, read.header)
        if chosen is None or not self._mask_fits(read, read.header):
            return None
        if subset.views.face_crop_aug_range and split_face(path.stem)[1] is None:
            remark = "no face in the name (_X_Y_W_H), cropped at the centre"
            self.findings.remarks.add(remark, path)
        return ImageRecord(
            path=path,
            size=read.header.size,
            caption=text,
            has_caption=read.caption is not None,
            repeats=subset.num_repeats,
            is_reg=subset.is_reg,
            subset=self.index,
            fit=chosen,
            mask=read.mask_path,
        )

    def _caption(self, caption: CaptionFile, read: Read) -> str:
        for remark in caption.remarks:
            self.findings.remarks.add(f"caption {remark}", read.caption_path or read.path)
        if not self.subset.captions.enable_wildcard:
            if len(caption.lines) > 1:
                remark = "caption more than one line, only the first is used (enable_wildcard)"
                self.findings.remarks.add(remark, read.caption_path or read.path)
            return caption.text
        if caption.bad_brace:
            line, column = caption.bad_brace
            self.findings.problem(f"{read.caption_path}:{line}:{column}", UNBALANCED, BALANCE)
        return "\n".join(caption.lines)

    def _masks(self, listing: Listing) -> list[str | None]:
        """Give the mask of each image, if the subset has any."""
        subset = self.subset
        if subset.mask_dir is None:
            return [None] * len(listing.images)
        try:
            masks, skipped = list_masks(subset.mask_dir, listing.images, self.findings.remarks)
        except OSError as error:
            message = f"{subset.mask_dir} cannot be read: {error.strerror}"
            self.findings.problem(subset.place, message)
            return [None] * len(listing.images)
        self.findings.skipped += skipped
        bare = [image for image, mask in zip(listing.images, masks, strict=True) if mask is None]
        if bare:
            more = f" and {len(bare) - 5} more" if len(bare) > 5 else ""
            self.findings.problem(
                subset.origins["conditioning_data_dir"],
                f"{len(bare)} of {len(masks)} images in {subset.image_dir} have no "
                f"mask in {subset.mask_dir}: {', '.join(bare[:5])}{more}",
                "a mask has the name of its image; images without one go into a subset "
                "of their own",
            )
        return masks

    def _mask_fits(self, read: Read, header: ImageHeader) -> bool:
        """Check the mask against its image."""
        remarks = self.findings.remarks
        if self.subset.alpha_mask:
            if not header.transparent:
                remarks.add("no alpha channel, so all of it counts (alpha_mask)", read.path)
        elif header.transparent:
            remarks.add("transparent, laid on white", read.path)
        if read.mask is None:
            return True
        assert read.mask_path is not None
        if isinstance(read.mask, ImageError):
            self.findings.bad_image(read.mask_path, str(read.mask))
            return False
        if read.mask.size != header.size:
            remarks.add("a mask of another size than its image, resized", read.mask_path)
        if not read.mask.grey:
            remarks.add("a mask in colour, its red channel counts", read.mask_path)
        return True

    def _fit(self, path: Path, header: ImageHeader) -> Fit | None:
        if header.misnamed:
            self.findings.remarks.add(f"in truth {header.format}, read as that", path)
        width, height = header.size
        if min(width, height) < self.multiple:
            message = f"{width}x{height} is less than {self.multiple} pixels on a side"
            self.findings.bad_image(path, message)
            return None
        if self.fit is None:
            return None
        try:
            chosen = self.fit(header.size)
        except SizeError as error:
            self.findings.bad_image(path, str(error))
            return None
        if chosen.resized[0] > 2 * width:
            self.findings.remarks.add("enlarged to more than twice its size", path)
        return chosen
