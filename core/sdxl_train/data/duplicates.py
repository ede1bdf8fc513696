"""Images whose files have the same content."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

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
    # Paths as texts: to hash and sort others takes longer than all the rest.
    alike: dict[tuple[int, Size], dict[str, FolderIndex]] = {}
    for image in images:
        path = str(image.path)
        folder, _, name = path.rpartition(os.sep)
        files = index.folder(folder)
        alike.setdefault((files.facts(name).stamp[0], image.size), {})[path] = files
    groups: dict[str, list[str]] = {}
    read: dict[Stamp, str] = {}
    for paths in alike.values():
        for path in sorted(paths) if len(paths) > 1 else ():
            try:
                files, name = paths[path], path.rpartition(os.sep)[2]
                stamp = files.facts(name).stamp
                content = read.get(stamp) or files.content(name)
                read[stamp] = content
            except OSError:  # it has gone since, which whoever needs it will say
                continue
            groups.setdefault(content, []).append(path)
    found = sorted(paths for paths in groups.values() if len(paths) > 1)
    return tuple(tuple(Path(path) for path in paths) for paths in found)
