"""Images whose files have the same content."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from sdxl_train.data.buckets import Size
    from sdxl_train.data.records import ImageRecord
    from sdxl_train.data.scan_index import FolderIndex, ScanIndex, Stamp


def find_duplicates(
    images: Iterable[ImageRecord], index: ScanIndex
) -> tuple[tuple[Path, ...], ...]:
    """Give the groups of files with the same content, sorted.

    Only files of one length and one picture size are read: others cannot be the same. Links to one
    file are read once.
    """
    alike: dict[tuple[int, Size], dict[Path, FolderIndex]] = {}
    for image in images:
        folder, name = os.path.split(image.path)
        files = index.folder(folder)
        key = (files.facts(name).stamp[0], image.size)
        alike.setdefault(key, {})[image.path] = files
    groups: dict[str, list[Path]] = {}
    read: dict[Stamp, str] = {}
    for paths in alike.values():
        for path in sorted(paths) if len(paths) > 1 else ():
            try:
                stamp = paths[path].facts(path.name).stamp
                content = read.get(stamp) or paths[path].content(path.name)
                read[stamp] = content
            except OSError:  # it has gone since, which whoever needs it will say
                continue
            groups.setdefault(content, []).append(path)
    return tuple(sorted(tuple(paths) for paths in groups.values() if len(paths) > 1))
