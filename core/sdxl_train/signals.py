"""Signals: finish the step, save, and leave with the exit code of the signal; or save and go on."""

from __future__ import annotations

import ctypes
import logging
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType, TracebackType

logger = logging.getLogger(__name__)

_STOP = (signal.SIGINT, signal.SIGTERM)
_SAVE: tuple[signal.Signals, ...] = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()


_PR_SET_PDEATHSIG = 1
"""Of Linux's ``prctl``: the signal to get when the parent ends."""


class Terminated(BaseException):
    """SIGTERM at a time when nothing is there to be saved."""


@contextmanager
def early_signals() -> Iterator[None]:
    """Until training listens: SIGTERM ends the process as Ctrl-C does, SIGUSR1 has nothing to save.

    Raises:
        Terminated: Where SIGTERM arrives.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    def decline(number: int, frame: FrameType | None) -> None:
        logger.info("%s: nothing to save yet", signal.Signals(number).name)

    with _handlers({signal.SIGTERM: end, **dict.fromkeys(_SAVE, decline)}):
        yield


def leave_to_parent(worker: int) -> None:
    """Have a worker process end with its parent, and pass over what a terminal sends to all."""
    for number in (signal.SIGINT, *_SAVE):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        # Where the parent is killed, its connections last as long as a forked worker holds them.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _handlers(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Set handlers in the main thread, which alone hears signals, and give back what was there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class RunSignals:
    """Remember what was signalled; a second signal to stop ends the process at once.

    Only the main thread hears signals: in another one (a notebook's) this does nothing.

    Args:
        patience: Seconds in which a second signal is taken for the first one, come another way: a
            launcher passes on what a terminal or a scheduler may have sent to all its processes.
    """

    def __init__(self, patience: float = 0) -> None:
        self.patience = patience
        self._first = 0.0
        self.received: signal.Signals | None = None
        self._save = False
        self._listening = ExitStack()

    def __enter__(self) -> RunSignals:
        """Start listening."""
        handlers = dict.fromkeys(_STOP, self._stop) | dict.fromkeys(_SAVE, self._ask_to_save)
        self._listening.enter_context(_handlers(handlers))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the handlers back as they were."""
        self._listening.close()

    def take_save_request(self) -> bool:
        """Tell whether a save was asked for since the last time."""
        asked, self._save = self._save, False
        return asked

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._first < self.patience:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._first = time.monotonic()
        self.received = signal.Signals(number)
        logger.warning(
            "%s: finishing this step, then saving; once more to stop at once", self.received.name
        )

    def _ask_to_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
        logger.info("%s: saving after this step, then going on", signal.Signals(number).name)


class TimeIsUp(BaseException):
    """A call took longer than it may. No ``Exception``, so that no library retries over it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Break off what runs in the ``with`` block after ``seconds``; 0 means no limit.

    Ends whatever waits in Python or in a system call: sockets, locks, sleep. Not code that holds
    the interpreter. Works in the main thread of a POSIX system; elsewhere there is no limit.

    Raises:
        TimeIsUp: If it took longer.
    """
    main = threading.current_thread() is threading.main_thread()
    if not seconds or not main or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeIsUp

    previous = signal.signal(signal.SIGALRM, expire)
    # Once more each second: a bare except in a library may swallow the first.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
