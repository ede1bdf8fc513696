"""Files that an earlier run of the same name left where this one writes, and who writes now."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sdxl_train.checkpoint import STEMS, is_network
from sdxl_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sdxl_train.config import OutputOptions, RunConfig

logger = logging.getLogger(__name__)

_NUMBER = r"(-\d{6}|-step\d{8}|-best)?"
_OTHERS = rf"{_NUMBER}-state|\.run\.json|\.report\.html"


def files_of_earlier_run(output: OutputOptions) -> list[Path]:
    """Give the networks, states and records in ``output_dir`` that bear the name of this run."""
    if not output.output_dir.is_dir():
        return []
    names = (output.output_name,) if output.output_name else tuple(dict.fromkeys(STEMS.values()))
    stems = "|".join(re.escape(name) for name in names)
    others = re.compile(f"({stems})({_OTHERS})")
    network = re.compile(rf"({stems}){_NUMBER}(-ema)?(\.\w+)?")
    return sorted(
        path
        for path in output.output_dir.iterdir()
        if others.fullmatch(path.name) or (network.fullmatch(path.name) and is_network(path))
    )


def clear_the_way(config: RunConfig) -> None:
    """Move what an earlier run left aside, so that nothing of it is lost or taken for new.

    A run that resumes goes on with the files that are there. ``--overwrite`` removes them.
    """
    output = config.output
    if config.training.resume is not None:
        return
    files = files_of_earlier_run(output)
    if not files:
        return
    if output.overwrite:
        for path in files:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    newest = time.localtime(max(path.stat().st_mtime for path in files))
    stem = f"{output.output_name or 'earlier'}-until-{time.strftime('%Y%m%d-%H%M%S', newest)}"
    folder, number = output.output_dir / stem, 1
    while folder.exists():
        number += 1
        folder = output.output_dir / f"{stem}-{number}"
    folder.mkdir()
    for path in files:
        path.rename(folder / path.name)
    logger.warning("moved %d files of an earlier run of this name to %s", len(files), folder)


@contextmanager
def sole_writer(config: RunConfig) -> Iterator[None]:
    """Hold the lock on this run's file names; the system frees it whatever becomes of the process.

    Raises:
        UserError: If another process writes files of this name here.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    output = config.output
    output.output_dir.mkdir(parents=True, exist_ok=True)
    path = output.output_dir / f".{output.output_name or 'last'}.lock"
    with path.open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError.of(
                config.place("output_name"),
                f"another run writes files of this name to {output.output_dir} now",
                "give this run another --output_name or --output_dir",
            ) from None
        except OSError as error:
            # Some network file systems know no locks; that must not keep anybody from training.
            logger.info("no lock on %s: %s", output.output_dir, error.strerror)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
