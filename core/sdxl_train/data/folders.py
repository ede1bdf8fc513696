"""Folders of images as people lay them out: the ``N_name`` convention, and what was meant instead.

In ``train_data_dir`` each folder ``N_name`` holds images that are repeated N times an epoch;
``name`` is the caption of those that have none. The convention is that of sd-scripts.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdxl_train.data.dataset_file import SubsetTable
from sdxl_train.data.images import image_names
from sdxl_train.errors import Problem
from sdxl_train.files import expanded

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@dataclass(kw_only=True)
class FoundFolders:
    """The subsets that a parent folder holds, and what is wrong or odd about it."""

    subsets: list[SubsetTable] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def lies_in(root: str, path: str) -> bool:
    """Tell whether a path lies in a folder; both must be real ones, without links in them."""
    return os.path.commonpath((root, path)) == root


def find_folders(parent: Path | None, *, is_reg: bool, place: str) -> FoundFolders:
    """Find the ``N_name`` folders of a parent folder, if one is given."""
    found = FoundFolders()
    if parent is None:
        return found
    parent = expanded(parent)
    problem = folder_problem(parent, place)
    if problem:
        found.problems.append(problem)
        return found
    # The parent itself may hold 100 000 images: it is listed once.
    entries = _entries(parent)
    num_images = _num_images(entries)
    folders = [parent / name for name in _folder_names(entries)]
    numbered = [(folder, split) for folder in folders if (split := _split(folder.name))]
    for folder, (repeats, tokens) in numbered:
        if not folder.name.isprintable():
            # Lone surrogates stand for bytes that are no UTF-8: metadata and options hold text.
            message, remedy = f"{folder.name!r} is not readable as text", "rename the folder"
            found.problems.append(Problem(place=place, message=message, remedy=remedy))
        elif repeats:
            found.subsets.append(
                SubsetTable(
                    image_dir=str(folder),
                    num_repeats=repeats,
                    class_tokens=tokens or None,
                    is_reg=is_reg or None,
                )
            )
        else:
            found.warnings.append(f"{folder}: left out, its name says 0 repeats")
    if found.subsets:
        found.warnings += _left_out(parent, folders, num_images)
    elif not found.problems:
        _without_numbers(parent, num_images, found, is_reg=is_reg, place=place)
    return found


def folder_problem(path: Path, place: str) -> Problem | None:
    """Say what is wrong with a path that should be a folder."""
    if path.is_dir():
        return None
    if path.exists():
        message, remedy = f"{path} is a file, not a folder", f"did you mean {path.parent}?"
    else:
        message, remedy = f"{path} does not exist", _near(path)
    return Problem(place=place, message=message, remedy=remedy)


DATASET_FILE = (".toml", ".json")
"""Endings of a dataset file."""
METADATA_FILE = (".json", ".jsonl")
"""Endings of a metadata file."""


def file_problem(path: Path, place: str, endings: tuple[str, ...]) -> Problem | None:
    """Say what is wrong with a path that should be a file of one of these endings."""
    if path.is_file():
        if path.suffix.lower() in endings:
            return None
        message = f"{path} is neither {' nor '.join(endings)}"
        remedy = "name a file of one of these kinds"
    elif path.exists():
        message = f"{path} is a folder, not a file"
        of_datasets = endings == DATASET_FILE
        remedy = "use --train_data_dir for a folder" if of_datasets else "name a file in it"
    else:
        message, remedy = f"{path} does not exist", _near(path)
    return Problem(place=place, message=message, remedy=remedy)


def count_images(folder: Path) -> int:
    """Count the images directly in a folder, by name."""
    return _num_images(_entries(folder))


def _counted(images: int) -> str:
    """Say how many images there are."""
    return "1 image" if images == 1 else f"{images} images"


def folders_with_images(parent: Path) -> list[Path]:
    """Give the folders in a folder that hold images themselves."""
    return [folder for folder in _folders(parent) if count_images(folder)]


def _split(name: str) -> tuple[int, str] | None:
    number, _, tokens = name.partition("_")
    return (int(number), tokens) if number.isascii() and number.isdecimal() else None


def _without_numbers(
    parent: Path, images: int, found: FoundFolders, *, is_reg: bool, place: str
) -> None:
    """Make what can be made of a folder without ``N_name`` folders, with its own images."""
    if images and not _split(parent.name):
        found.subsets.append(SubsetTable(image_dir=str(parent), is_reg=is_reg or None))
        found.warnings.append(
            f"{parent} has no N_name folders: what it holds itself is taken, {_counted(images)}"
        )
        return
    message = f"{parent} has no N_name folders, such as 10_cat"
    if images:
        message += ", but is one itself"
        remedy = f"give the folder above it: {parent.parent}"
    elif named := folders_with_images(parent):
        remedy = f"put the number of repeats before the name: 1_{named[0].name}"
        message += f"; it has {_listed(named)}"
    elif deeper := [f for f in _folders(parent) if any(_split(g.name) for g in _folders(f))]:
        remedy = f"did you mean {deeper[0]}?"
    else:
        message += f", and no images ({_contents(parent)})"
        remedy = "put the images into a folder 1_name inside it"
    found.problems.append(Problem(place=place, message=message, remedy=remedy))


def _left_out(parent: Path, folders: Iterable[Path], images: int) -> list[str]:
    """Name the images that the convention passes over: of the parent, and of other folders."""
    warnings = []
    if images:
        warnings.append(f"{parent}: left out beside the N_name folders: {_counted(images)}")
    named = [folder for folder in folders if not _split(folder.name) and count_images(folder)]
    if named:
        warnings.append(
            f"{parent}: left out for want of a number before the name: {_listed(named)}"
        )
    return warnings


def _contents(folder: Path) -> str:
    kinds = [is_folder(entry) for entry in _entries(folder)]
    return f"{sum(kinds)} folders, {len(kinds) - sum(kinds)} other files"


def _listed(folders: Iterable[Path]) -> str:
    return ", ".join(f"{folder.name} ({_counted(count_images(folder))})" for folder in folders)


def _near(path: Path) -> str:
    """Suggest an existing path like one that does not exist."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
        if parent == path:
            return "check the path"
    names = difflib.get_close_matches(path.name, sorted(e.name for e in _entries(parent)), n=1)
    return f"did you mean {parent / names[0]}?" if names else f"{parent} has no {path.name}"


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry of a folder is, or leads to, a folder."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself leads nowhere, and certainly to no folder
        return False


def _folders(parent: Path) -> list[Path]:
    return [parent / name for name in _folder_names(_entries(parent))]


def _folder_names(entries: Iterable[os.DirEntry[str]]) -> list[str]:
    return sorted(e.name for e in entries if not e.name.startswith(".") and is_folder(e))


def _num_images(entries: Iterable[os.DirEntry[str]]) -> int:
    return len(image_names(entry.name for entry in entries))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder. Its entries know what they are; to ask for 100 000 takes seconds."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:  # a folder that may not be listed has nothing to suggest
        return []
