"""Writing files so that they are there complete or not at all, whoever else writes them."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator


def expanded(path: Path) -> Path:
    """Put in environment variables and the home folder."""
    return Path(os.path.expandvars(path)).expanduser()


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file under a name of its own, then give it its name.

    Several processes may write the same file: one of them wins, whole.

    Args:
        path: The file; one of that name keeps its content until then, or for good on an error.
        data: Its content.
        durable: Have the content on the disk before the name, so that it outlasts a power cut.
            What is checked when it is read, and can be made again, need not.

    Raises:
        OSError: If it cannot be written; nothing of it remains.
    """
    with replacing(path, durable=durable) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that takes its name only when it is complete, as :func:`replace_file` does.

    Raises:
        OSError: If it cannot be written; nothing of it remains.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        # mkstemp makes files private; this one is for everyone the folder is for.
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


TEMPORARY = ".sdxl-train-"
"""How the names of unfinished files begin; a process that is killed leaves one behind."""


@cache
def _umask() -> int:
    """Read the mask once: reading sets it for a moment, in every thread."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
