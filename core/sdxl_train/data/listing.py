"""What lies in a folder of images: images, their caption files, and everything else by reason."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdxl_train.data.findings import Skipped
from sdxl_train.data.folders import folders_with_images, is_folder, lies_in
from sdxl_train.data.images import OTHER_IMAGE_EXTENSIONS, image_names
from sdxl_train.data.views import split_face

if TYPE_CHECKING:
    from collections.abc import Container, Sequence
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
    """The content of a folder, sorted by name. Files in it are told by their names alone.

    Attributes:
        folder: The folder.
        images: Files that are images by their names.
        captions: The caption file of each image, or None.
        other_captions: Files that look like captions of the images, under another ending.
        skipped: All that is left out.
        astray: Links to files that do not lie in the folder.
    """

    folder: Path
    images: list[str] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    other_captions: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    astray: list[str] = field(default_factory=list)

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
    names, folders, astray = _entries(folder)
    images = [name for name in image_names(names) if name not in folders]
    others = dict.fromkeys(names)
    for name in images:
        del others[name]
    others.pop(CACHE_FOLDER, None)
    listing = Listing(folder=folder, images=images)
    listing.astray.extend(name for name in astray if name not in folders)
    endings = [
        form
        for ending in caption_extensions
        for form in (ending, ending.upper())
        # To look for a file that is not there takes as long as for one that is.
        if any(name.endswith(form) for name in others)
    ]
    stems: set[str] = set()
    for name in images:
        stem = _stem(name)
        listing.captions.append(_caption_of(stem, others, endings))
        if stem in stems:
            remarks.add("the same name as another image, and so the same caption", folder / name)
        stems.add(stem)
    used = set(listing.captions)
    for name in others:
        if name not in used:
            _pass_over(name, name in folders, listing, stems, caption_extensions, remarks)
    return listing


def list_masks(
    folder: Path, images: Sequence[str], remarks: Remarks
) -> tuple[list[str | None], list[Skipped]]:
    """Find the mask of each image, an image of the same name in another folder.

    Returns:
        The masks, None for an image that has none; and the images in the folder that are no masks.

    Raises:
        OSError: If the folder cannot be read.
    """
    by_stem: dict[str, str] = {}
    names, folders, astray = _entries(folder)
    for name in image_names(names):
        if name in astray:
            remarks.add("a link out of the folder, left out", folder / name)
        elif name not in folders:
            if _stem(name) in by_stem:
                remarks.add("a second mask of the same name, left out", folder / name)
            by_stem.setdefault(_stem(name), name)
    masks = [by_stem.get(_stem(image)) for image in images]
    used = set(masks)
    reason = "mask without an image"
    skipped = [
        Skipped(path=folder / name, reason=reason) for name in by_stem.values() if name not in used
    ]
    for entry in skipped:
        remarks.add(f"{reason}, left out", entry.path)
    return masks, skipped


def _entries(folder: Path) -> tuple[list[str], set[str], list[str]]:
    """List a folder.

    Returns:
        All names in it, sorted; which of them are folders; links to what does not lie in it.
    """
    with os.scandir(folder) as found:
        # Told with the listing itself; asking for each file takes seconds for 100 000.
        entries = list(found)
    links = [entry for entry in entries if entry.is_symlink()]
    root = os.path.realpath(folder) if links else ""
    astray = []
    for entry in links:
        # A dataset from elsewhere must not reach what else lies on this machine.
        target = os.path.realpath(entry.path)
        if os.path.exists(target) and not lies_in(root, target):  # noqa: PTH110 - no need of a path
            astray.append(entry.name)
    names = sorted(entry.name for entry in entries)
    folders = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
    return names, folders | {entry.name for entry in links if is_folder(entry)}, astray


def _stem(image: str) -> str:
    """Give the name of an image without its ending; a path would take ten times as long."""
    return image[: image.rindex(".")]


def _caption_of(stem: str, others: Container[str], endings: Sequence[str]) -> str | None:
    for ending in endings:
        if stem + ending in others:
            return stem + ending
    bare, _ = split_face(stem)
    return next((bare + ending for ending in endings if bare + ending in others), None)


def _pass_over(
    name: str,
    is_dir: bool,
    listing: Listing,
    stems: Container[str],
    extensions: Sequence[str],
    remarks: Remarks,
) -> None:
    path = listing.folder / name
    ending = path.suffix.lower()
    if name.startswith("."):
        reason = "hidden"
    elif is_dir:
        reason = "folder; only files directly in the image folder count"
    elif ending in OTHER_IMAGE_EXTENSIONS:
        reason = f"image type {ending} is not supported"
        remarks.add(f"{reason}, left out", path)
    elif ending in extensions and path.stem not in stems:
        reason = "caption without an image"
    elif ending in _CAPTION_EXTENSIONS and path.stem in stems:
        reason = "not the caption file that is used"
        listing.other_captions.append(name)
    else:
        reason = "not an image"
    listing.skipped.append(Skipped(path=path, reason=reason))
