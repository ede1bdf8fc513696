"""How the program speaks: the log and the final report of what is wrong."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from sdxl_train.errors import EndedElsewhereError, LostConnectionError, UserError
from sdxl_train.launch import launched
from sdxl_train.progress import allow_bars
from sdxl_train.remarks import concerns_the_run
from sdxl_train.wording import visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sdxl_train.config import RunConfig
    from sdxl_train.errors import Problem, SdxlTrainError


class _Console(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at the time: tests and notebooks replace it.

    Attributes:
        file: Where it writes instead.
    """

    file: TextIO | None = None

    def emit(self, record: logging.LogRecord) -> None:
        # A line of the log goes above a bar, not through it.
        from tqdm import tqdm

        self.stream = self.file or sys.stderr
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def begin_anew(self) -> None:
        """Write everything to standard error, also what an earlier run in this process said."""
        self.setLevel(logging.NOTSET)
        self.filters = [concerns_the_run, _Once()]
        if self.file is not None:
            self.file.close()
        self.file = None

    def format(self, record: logging.LogRecord) -> str:
        """Give plain text for information, the level in front of what is more."""
        text = visible(super().format(record))
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
    console = _console()
    if console is None:
        console = _Console()
        logging.getLogger().addHandler(console)
    console.begin_anew()
    allow_bars(allowed=True)
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


def _console() -> _Console | None:
    found = (h for h in logging.getLogger().handlers if isinstance(h, _Console))
    return next(found, None)


def follow_options(config: RunConfig) -> None:
    """Write as ``--console_log_level``, ``--console_log_file`` and ``--console_log_simple`` say.

    Raises:
        UserError: If the file cannot be written.
    """
    console, options = _console(), config.host
    if console is None:
        return
    level = logging.getLevelNamesMapping()[options.console_log_level or "INFO"]
    console.setLevel(level)
    for module in ("sdxl_train", *(type(one).__module__ for one in config.components)):
        logging.getLogger(module.partition(".")[0]).setLevel(min(level, logging.INFO))
    allow_bars(allowed=not options.console_log_simple and options.console_log_file is None)
    if options.console_log_file is not None:
        try:
            console.file = options.console_log_file.open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise UserError.of(
                config.place("console_log_file"),
                f"{options.console_log_file} cannot be written: {error.strerror}",
                "name a file in a folder that is there",
            ) from None


def discard_output() -> None:
    """Throw the rest of standard output away: its reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(error: SdxlTrainError) -> None:
    """Print what is wrong, each problem on its own, to standard error."""
    here = launched()
    # Each machine may have wrong input of its own; a lost process may be the main one.
    speaks = here.main or here.local_index == 0 or isinstance(error, LostConnectionError)
    if isinstance(error, EndedElsewhereError) or not speaks:
        return
    if isinstance(error, UserError):
        count = len(error.problems)
        print(
            f"sdxl-train: {count} problem{'' if count == 1 else 's'}, nothing was started",
            file=sys.stderr,
        )
        for text in _shown(error.problems):
            print(f"  {visible(text)}".replace("\n", "\n  "), file=sys.stderr)
        return
    for line in (f"error: {error}", *getattr(error, "__notes__", [])):
        print(visible(line), file=sys.stderr)


MOST_ALIKE = 20
"""Problems with the same message that are told one by one: a dataset may have 100 000."""


def _shown(problems: Sequence[Problem]) -> Iterator[str]:
    alike = Counter[tuple[str, str]]()
    for problem in problems:
        kind = (problem.message, problem.remedy)
        alike[kind] += 1
        if alike[kind] <= MOST_ALIKE:
            yield str(problem)
    for (message, _), count in alike.items():
        if count > MOST_ALIKE:
            yield f"and {count - MOST_ALIKE} more: {message}"


def warn(texts: Iterable[str]) -> None:
    """Print remarks where the log goes, unless they are below its level."""
    console = _console()
    if not launched().main or (console is not None and console.level > logging.WARNING):
        return
    for text in texts:
        print(f"warning: {visible(text)}", file=(console and console.file) or sys.stderr)
