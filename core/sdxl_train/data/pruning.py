"""Removing the files of caches that nothing uses any more."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_train.disk import readable_size
from sdxl_train.errors import UserError
from sdxl_train.files import TEMPORARY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from sdxl_train.data.entry_file import Entry

_ENTRY = re.compile(r"(\w+)-[0-9a-f]{16}-[0-9a-f]{32}\.safetensors")
_ABANDONED_SECONDS = 3600
"""After this time no process still writes a file that it has not finished."""


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What was removed from a folder, and what stays."""

    folder: Path
    removed: int
    removed_bytes: int
    kept: int

    def __str__(self) -> str:
        size = readable_size(self.removed_bytes)
        return f"{self.folder}: {self.removed} files removed ({size}), {self.kept} in use"


def prune(entries: Iterable[Entry]) -> Iterator[Pruned]:
    """Remove the other files of the kinds of some entries from their folders.

    Files that a process left unfinished are removed too, those of other programs never.

    Raises:
        UserError: If a file cannot be removed.
    """
    used: dict[Path, set[str]] = {}
    kinds: set[str] = set()
    for entry in entries:
        used.setdefault(entry.folder, set()).add(entry.name)
        kinds.add(entry.kind)
    for folder, names in used.items():
        if folder.is_dir():
            yield _pruned(folder, names, kinds)


def _pruned(folder: Path, used: set[str], kinds: set[str]) -> Pruned:
    sizes, kept = [], 0
    for item in list(os.scandir(folder)):
        found = _ENTRY.fullmatch(item.name)
        if item.name in used:
            kept += 1
        elif (found and found[1] in kinds) or _is_abandoned(item):
            sizes.append(item.stat().st_size)
            try:
                (folder / item.name).unlink(missing_ok=True)  # another process may prune as well
            except OSError as error:
                message = f"{item.name} cannot be removed: {error.strerror}"
                raise UserError.of(str(folder), message, "change the permissions") from None
    return Pruned(folder=folder, removed=len(sizes), removed_bytes=sum(sizes), kept=kept)


def _is_abandoned(item: os.DirEntry[str]) -> bool:
    unfinished = item.name.startswith(TEMPORARY)
    return unfinished and item.stat().st_mtime < time.time() - _ABANDONED_SECONDS
