"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Never

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


_bars_allowed = True


def allow_bars(*, allowed: bool) -> None:
    """Say whether work may be shown as bars in this process."""
    global _bars_allowed
    _bars_allowed = allowed


def shows_bars() -> bool:
    """Tell whether to show work as a bar: on a terminal, unless lines are asked for."""
    return _bars_allowed and sys.stderr.isatty()


class _Lines:
    """Tells the rate and the time that is left in lines of the log."""

    def __init__(self, title: str, unit: str) -> None:
        self.title = title
        self.unit = unit
        self.done = 0
        self._began = self._told = time.monotonic()

    def show(self, done: int, total: int) -> None:
        self.done, now = done, time.monotonic()
        if now - self._told >= SECONDS_BETWEEN_LINES and done:
            self._told = now
            left = (total - done) * (now - self._began) / done
            logger.info(
                "%s: %d/%d, %s, %s left",
                self.title,
                done,
                total,
                self.rate(),
                tqdm.format_interval(left),
            )

    def rate(self) -> str:
        passed = max(time.monotonic() - self._began, 1e-9)
        return f"{self.done / passed:.3g} {self.unit}/s"


@contextmanager
def progress(title: str, unit: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show how far a piece of work is, and at last how fast it went.

    Args:
        title: What is done.
        unit: What is counted, as in ``img/s``.
        shown: Show it; another process does otherwise.

    Yields:
        What to call with the number of items done and their total.
    """
    if not shown:
        yield lambda done, total: None
        return
    lines = _Lines(title, unit)
    if not shows_bars():
        yield lines.show
    else:
        bar: tqdm[Never]
        with tqdm(desc=title, unit=unit) as bar:

            def show(done: int, total: int) -> None:
                lines.done, bar.total = done, total
                bar.update(done - bar.n)

            yield show
    if lines.done:
        logger.info("%s: %d done, %s", title, lines.done, lines.rate())
