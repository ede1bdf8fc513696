"""The main process's state, for processes on machines that do not see its files."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.ranks import Ranks

PIECE_BYTES = 2**26

Contents: TypeAlias = dict[str, tuple[int, str]]
"""Of each file in a folder: size in bytes and digest."""


@contextmanager
def within_reach(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """Give a folder that holds what ``folder`` holds in the main process.

    That is ``folder`` itself, except where another machine has none or another: there a temporary
    copy, sent by the main process.

    Raises:
        OSError: If the copy cannot be written.
    """
    if ranks.count == 1:
        yield folder
        return
    here = _contents(folder)
    wanted = ranks.from_main(here)
    lacks = here != wanted
    if not any(ranks.gather(lacks)):
        yield folder
        return
    with TemporaryDirectory(prefix="sdxl-train-state-") as temporary:
        copy = Path(temporary)
        for name, (size, _) in wanted.items():
            _send(folder / name, size, copy / name if lacks else None, ranks)
        yield copy if lacks else folder


def _contents(folder: Path) -> Contents:
    contents: Contents = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()
        contents[path.name] = (path.stat().st_size, digest)
    return contents


def _send(source: Path, size: int, target: Path | None, ranks: Ranks) -> None:
    """Send a file of the main process, in pieces, to the processes that have a target for it."""
    with ExitStack() as stack:
        file = stack.enter_context(source.open("rb")) if ranks.main else None
        for start in range(0, max(size, 1), PIECE_BYTES):
            piece = ranks.from_main(file.read(PIECE_BYTES) if file else b"")
            if target is not None:
                with target.open("ab" if start else "wb") as copy:
                    copy.write(piece)
