"""How the program speaks: the log and the final report of what is wrong."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from sdxl_train.errors import EndedElsewhereError, UserError
from sdxl_train.launch import launched
from sdxl_train.remarks import concerns_the_run

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdxl_train.errors import SdxlTrainError


class _Console(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at the time: tests and notebooks replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """Give plain text for information, the level in front of what is more."""
        text = super().format(record)
        if record.levelno > logging.INFO:
            return f"{record.levelname.lower()}: {text}"
        return text


class _Once(logging.Filter):
    """Say a thing once: a run builds its model twice, for the plan and for the training."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Let a record through whose text its logger has not said before."""
        text = (record.name, record.getMessage())
        if text in self._said:
            return False
        self._said.add(text)
        return True


def configure_output() -> None:
    """Send the log to standard error, and let no character of a message stop the program."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the program, as some services do
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    if not launched().main:
        discard_output()
        logging.getLogger().addHandler(logging.NullHandler())
        return
    root = logging.getLogger()
    if not any(isinstance(handler, _Console) for handler in root.handlers):
        console = _Console()
        console.addFilter(concerns_the_run)
        console.addFilter(_Once())
        root.addHandler(console)
    logging.getLogger("sdxl_train").setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A console of another encoding must not turn a message into a traceback.
        sys.stdout.reconfigure(errors="backslashreplace")


def hide_from_process_list(secrets: Iterable[str]) -> None:
    """Overwrite words of the command line where the system keeps it for ``ps``: Linux only."""
    import ctypes

    status = Path("/proc/self/stat")
    if not status.exists():
        return
    # The name of the program, in brackets, may hold blanks; fields 48 and 49 bound the words.
    fields = status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    words = ctypes.string_at(start, end - start)
    for secret in map(os.fsencode, secrets):
        at = words.find(secret)
        while secret and at >= 0:
            ctypes.memset(start + at, ord("*"), len(secret))
            at = words.find(secret, at + len(secret))


def discard_output() -> None:
    """Throw the rest of standard output away: its reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(error: SdxlTrainError) -> None:
    """Print what is wrong, each problem on its own, to standard error."""
    here = launched()
    if isinstance(error, EndedElsewhereError) or not (here.main or here.local_index == 0):
        return
    if isinstance(error, UserError):
        count = len(error.problems)
        print(
            f"sdxl-train: {count} problem{'' if count == 1 else 's'}, nothing was started",
            file=sys.stderr,
        )
        for problem in error.problems:
            print(f"  {problem}".replace("\n", "\n  "), file=sys.stderr)
        return
    for line in (f"error: {error}", *getattr(error, "__notes__", [])):
        print(line, file=sys.stderr)


def warn(texts: Iterable[str]) -> None:
    """Print remarks to standard error."""
    for text in texts if launched().main else ():
        print(f"warning: {text}", file=sys.stderr)
