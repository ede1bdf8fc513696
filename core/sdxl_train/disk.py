"""Room on the disk for what a run writes."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from sdxl_train.errors import Problem, TrainingError

if TYPE_CHECKING:
    from pathlib import Path

_HEADROOM = 1.02
"""Headers, metadata and blocks of the file system, beside the tensors."""


def free_bytes(folder: Path) -> int:
    """Give the free bytes of the file system that ``folder``, or its nearest parent, lies on."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def require_room(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin a file that cannot be finished.

    Raises:
        TrainingError: If less than ``needed`` bytes are free.
    """
    free = free_bytes(folder)
    if free < needed * _HEADROOM:
        raise TrainingError(
            f"{what} needs {readable_size(needed)}, and {folder} has {readable_size(free)} free: "
            "nothing was written, the files saved before are whole. Make room, then go on with "
            "--resume"
        )


def room_problem(place: str, folder: Path, needed: int) -> Problem | None:
    """Say that there is no room for even one save, if so."""
    free = free_bytes(folder)
    if free >= needed * _HEADROOM:
        return None
    return Problem(
        place=place,
        message=f"one save needs {readable_size(needed)}, and {folder} has "
        f"{readable_size(free)} free",
        remedy="make room, or write to another disk",
    )


def room_remark(folder: Path, needed: int, files: int) -> str | None:
    """Say that the disk fills up before the end of the run, if so."""
    free = free_bytes(folder)
    if free >= needed * _HEADROOM:
        return None
    return (
        f"the {files} saves of this run need about {readable_size(needed)}, and {folder} has "
        f"{readable_size(free)} free: keep fewer with --save_last_n_steps or --save_last_n_epochs"
    )


def readable_size(count: int) -> str:
    """Give a number of bytes in words: ``1.2 GB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
