"""How the program speaks: the log and the final report of what is wrong."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from sdxl_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdxl_train.errors import SdxlTrainError


class _Formatter(logging.Formatter):
    """Plain text for information; the level in front of what is more."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno > logging.INFO:
            return f"{record.levelname.lower()}: {text}"
        return text


def configure_logging() -> None:
    """Send the log of the framework and its plugins to standard error."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter("%(message)s"))
        root.addHandler(handler)
    for name in ("sdxl_train", "sdxl_lora_plugins"):
        logging.getLogger(name).setLevel(logging.INFO)


def report(error: SdxlTrainError) -> None:
    """Print what is wrong, each problem on its own, to standard error."""
    if not isinstance(error, UserError):
        _print_lines([f"error: {error}", *getattr(error, "__notes__", [])])
        return
    count = len(error.problems)
    head = "1 problem" if count == 1 else f"{count} problems"
    lines = [f"sdxl-train: {head}, nothing was started"]
    lines += [f"  {problem}".replace("\n", "\n  ") for problem in error.problems]
    _print_lines(lines)


def warn(texts: Iterable[str]) -> None:
    """Print remarks to standard error."""
    _print_lines(f"warning: {text}" for text in texts)


def _print_lines(lines: Iterable[str]) -> None:
    encoding = sys.stderr.encoding or "utf-8"
    for line in lines:
        # A console of another encoding must not turn a message into a traceback.
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr)
