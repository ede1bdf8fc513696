"""When to write again what is rewritten as a run goes: often, but at a bounded cost."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Pace:
    """Says when work is due again, so that it takes no more than a share of the time.

    Args:
        seconds: The least time between the end of one piece of work and the next.
        share: The most of all time that the work may take.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        *,
        seconds: float = 30,
        share: float = 0.01,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds = seconds
        self.share = share
        self.spent = 0.0
        """Seconds that all the work has taken."""
        self._clock = clock
        self._rest = 0.0
        self._ended: float | None = None

    def is_due(self) -> bool:
        """Tell whether it is time."""
        return self._ended is None or self._clock() - self._ended >= self._rest

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Measure a piece of work; the longer it takes, the longer the rest behind it."""
        began = self._clock()
        try:
            yield
        finally:
            self._ended = self._clock()
            taken = self._ended - began
            self.spent += taken
            self._rest = max(self.seconds, taken / self.share)
