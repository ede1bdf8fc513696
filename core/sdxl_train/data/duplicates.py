"""Images whose files have the same content."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sdxl_train.data.file_facts import Mark
    from sdxl_train.data.records import ImageRecord
    from sdxl_train.data.scan_index import FolderIndex, ScanIndex

K = TypeVar("K")
V = TypeVar("V")


def find_duplicates(
    images: Iterable[ImageRecord], index: ScanIndex
) -> tuple[tuple[Path, ...], ...]:
    """Give the groups of files with the same content, sorted.

    Only files of one length and one picture size are read: others cannot be the same. Links to one
    file are read once.
    """
    alike = _groups(((image.num_bytes, image.size), image) for image in images)
    groups = _groups(_contents(chain.from_iterable(alike), index))
    # Several datasets may have an image. Texts: to hash paths takes longer than all the rest.
    files = (sorted({(str(image.folder), image.name) for image in group}) for group in groups)
    found = sorted(group for group in files if len(group) > 1)
    return tuple(tuple(Path(folder, name) for folder, name in group) for group in found)


def _groups(pairs: Iterable[tuple[K, V]]) -> Iterable[list[V]]:
    """Give the values that share their keys with others. There may be 100 000, mostly single."""
    first: dict[K, V] = {}
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        other = first.setdefault(key, value)
        if other is not value:
            groups.setdefault(key, [other]).append(value)
    return groups.values()


def _contents(images: Iterable[ImageRecord], index: ScanIndex) -> Iterator[tuple[str, ImageRecord]]:
    """Give the hash of each image's bytes, and the image."""
    read: dict[Mark, str] = {}
    folder, files = None, None
    for image in images:
        if files is None or image.folder is not folder:
            folder, files = image.folder, index.folder(image.folder)
        try:
            content = files.known_content(image.name) or _content(files, image.name, read)
        except OSError:  # it has gone since, which whoever needs it will say
            continue
        yield content, image


def _content(files: FolderIndex, name: str, read: dict[Mark, str]) -> str:
    """Read a file, unless it is one that was read under another name."""
    mark = files.facts(name).mark
    if mark not in read:
        read[mark] = files.content(name)
    return read[mark]
