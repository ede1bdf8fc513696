"""What lies in a folder of images: images, their caption files, and everything else by reason."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdxl_train.data.findings import Skipped
from sdxl_train.data.folders import folders_with_images
from sdxl_train.data.images import OTHER_IMAGE_EXTENSIONS, is_image_name
from sdxl_train.data.views import split_face

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sdxl_train.data.findings import Remarks

_CAPTION_EXTENSIONS = frozenset(
    {".txt", ".text", ".caption", ".captions", ".cap", ".tag", ".tags", ".prompt", ".wd14"}
)
"""Endings under which people keep captions."""
CACHE_FOLDER = "sdxl-train-cache"
"""The folder among the images that holds their encodings."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The content of a folder, sorted by name.

    Attributes:
        folder: The folder.
        images: Files that are images by their names.
        captions: The caption file of each image, or None.
        other_captions: Files that look like captions of the images, under another ending.
        skipped: All that is left out.
    """

    folder: Path
    images: list[Path] = field(default_factory=list)
    captions: list[Path | None] = field(default_factory=list)
    other_captions: list[Path] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def contents(self) -> str:
        """Say in a few words what is there instead of images."""
        reasons = [entry.reason for entry in self.skipped]
        counted = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
        return (
            "; ".join(f"{count} x {reason}" for reason, count in counted.items()) or "it is empty"
        )

    @property
    def advice(self) -> str:
        """Suggest where the images may be."""
        deeper = folders_with_images(self.folder)
        if not deeper:
            return "supported are png, jpg, webp and bmp"
        return f"images lie one level deeper: name {deeper[0]}" + (
            f" and {len(deeper) - 1} more as subsets of their own" if len(deeper) > 1 else ""
        )


def list_folder(folder: Path, caption_extensions: Sequence[str], remarks: Remarks) -> Listing:
    """List a folder. Only what lies directly in it counts.

    Args:
        folder: The folder.
        caption_extensions: Endings of caption files; the first that exists is an image's caption.
        remarks: Gets what the user should know of single files.

    Raises:
        OSError: If the folder cannot be read.
    """
    listing = Listing(folder=folder)
    others: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        # Told with the listing itself; asking for each file takes seconds for 100 000.
        names = sorted((entry.name, _is_folder(entry)) for entry in entries)
    for name, is_dir in names:
        if is_image_name(name) and not is_dir:
            listing.images.append(folder / name)
        elif name != CACHE_FOLDER:
            others[name] = folder / name
    stems: dict[str, Path] = {}
    for image in listing.images:
        listing.captions.append(_caption_of(image, others, caption_extensions))
        if image.stem in stems:
            remarks.add("the same name as another image, and so the same caption", image)
        stems.setdefault(image.stem, image)
    used = {path.name for path in listing.captions if path}
    for name, path in others.items():
        if name not in used:
            _pass_over(path, listing, stems, caption_extensions, remarks)
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself leads nowhere, and certainly to no folder
        return False


def list_masks(
    folder: Path, images: Sequence[Path], remarks: Remarks
) -> tuple[list[Path | None], list[Skipped]]:
    """Find the mask of each image, an image of the same name in another folder.

    Returns:
        The masks, None for an image that has none; and the images in the folder that are no masks.

    Raises:
        OSError: If the folder cannot be read.
    """
    by_stem: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if is_image_name(path.name) and not path.is_dir():
            if path.stem in by_stem:
                remarks.add("a second mask of the same name, left out", path)
            by_stem.setdefault(path.stem, path)
    masks = [by_stem.get(image.stem) for image in images]
    used = set(masks)
    reason = "mask without an image"
    skipped = [Skipped(path=p, reason=reason) for p in by_stem.values() if p not in used]
    for entry in skipped:
        remarks.add(f"{reason}, left out", entry.path)
    return masks, skipped


def _caption_of(image: Path, others: dict[str, Path], extensions: Sequence[str]) -> Path | None:
    stems = dict.fromkeys((image.stem, split_face(image.stem)[0]))
    for stem in stems:
        for extension in extensions:
            for ending in (extension, extension.upper()):
                if found := others.get(stem + ending):
                    return found
    return None


def _pass_over(
    path: Path,
    listing: Listing,
    stems: dict[str, Path],
    extensions: Sequence[str],
    remarks: Remarks,
) -> None:
    ending = path.suffix.lower()
    if path.name.startswith("."):
        reason = "hidden"
    elif path.is_dir():
        reason = "folder; only files directly in the image folder count"
    elif ending in OTHER_IMAGE_EXTENSIONS:
        reason = f"image type {ending} is not supported"
        remarks.add(f"{reason}, left out", path)
    elif ending in extensions and path.stem not in stems:
        reason = "caption without an image"
    elif ending in _CAPTION_EXTENSIONS and path.stem in stems:
        reason = "not the caption file that is used"
        listing.other_captions.append(path)
    else:
        reason = "not an image"
    listing.skipped.append(Skipped(path=path, reason=reason))
