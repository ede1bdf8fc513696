"""Images whose files have the same content."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdxl_train.data.buckets import Size
    from sdxl_train.data.file_facts import Stamp
    from sdxl_train.data.records import ImageRecord
    from sdxl_train.data.scan_index import ScanIndex


def find_duplicates(
    images: Iterable[ImageRecord], index: ScanIndex
) -> tuple[tuple[Path, ...], ...]:
    """Give the groups of files with the same content, sorted.

    Only files of one length and one picture size are read: others cannot be the same. Links to one
    file are read once.
    """
    alike: dict[tuple[int, Size], list[ImageRecord]] = {}
    for image in images:
        alike.setdefault((image.num_bytes, image.size), []).append(image)
    groups: dict[str, set[tuple[str, str]]] = {}
    read: dict[Stamp, str] = {}
    for several in alike.values():
        for image in several if len(several) > 1 else ():
            files = index.folder(image.folder)
            try:
                stamp = files.facts(image.name).stamp
                content = read.get(stamp) or files.content(image.name)
                read[stamp] = content
            except OSError:  # it has gone since, which whoever needs it will say
                continue
            # Texts: to hash and sort paths takes longer than all the rest.
            groups.setdefault(content, set()).add((str(image.folder), image.name))
    found = sorted(sorted(files) for files in groups.values() if len(files) > 1)
    return tuple(tuple(Path(folder, name) for folder, name in files) for files in found)
