"""Several processes that train together, and how they meet.

Processes meet in the same order everywhere, and each meeting begins with a roll call: a few numbers
that say who was signalled and whose work failed. So whoever fails, wherever, only has to answer the
next roll call to end the run in all processes at once. It goes over gloo, on the CPU, so a process
that was killed is missed by the others while they wait for it, and not inside a GPU's queue.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.distributed.rendezvous import rendezvous

from sdxl_train.errors import (
    CutOffError,
    EndedElsewhereError,
    LostConnectionError,
    Problem,
    TrainingError,
    UserError,
)
from sdxl_train.exchange import FlatExchange
from sdxl_train.launch import launched
from sdxl_train.ranks import ALONE, AttemptError, Ranks
from sdxl_train.signals import TimeIsUp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from sdxl_train.process_options import ProcessOptions

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)

_MAIN_LIVES = "the main process lives"
_WORD = "what ended the run"
_SIGN_OF_LIFE = timedelta(seconds=3)


@dataclass(frozen=True, kw_only=True)
class _Told:
    """An error in a form that travels."""

    text: str
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, error: Exception) -> _Told:
        known = isinstance(error, (TrainingError, UserError))
        return cls(
            text=str(error) if known else f"{type(error).__name__}: {error}",
            problems=error.problems if isinstance(error, UserError) else (),
            notes=tuple(getattr(error, "__notes__", ())),
        )


@dataclass(frozen=True)
class _Failure:
    """What a process gives whose part of an attempt failed."""

    text: str


class SeveralRanks(Ranks):
    """One of several processes."""

    patience = 3.0

    def __init__(self, exchange: FlatExchange, timeout: timedelta) -> None:
        self._exchange = exchange
        self._timeout = timeout
        self._store = _get_default_store()
        self.index = dist.get_rank()
        self.count = dist.get_world_size()
        self._stop: signal.Signals | None = None
        self._save = False
        self.over = False
        self._lost = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error inside end the run in every process; leave when all have come to the end."""
        try:
            try:
                yield
            except Exception as error:
                if self.entangled and not self.over:
                    self._leave(error)
                elif not self.over:
                    with suppress(TrainingError):  # of the others; this one's comes first
                        self._roll_call(error)
                raise
            # Who is last here may fail yet: the others wait for it.
            self._roll_call()
        except Exception as error:
            self._part()
            if self.main or (self._lost and self._speaks_for_main()):
                raise
            kind = CutOffError if self.entangled else EndedElsewhereError
            raise kind("another process says what ended the run") from error

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Let an error inside end in every process what all of them attempt, and not the run.

        Whoever fails says so in place of what it would give at the next :meth:`gather`; inside, the
        processes must meet in no other way.

        Raises:
            AttemptError: If another process failed.
        """
        outer, self.attempting = self.attempting, True
        try:
            try:
                yield
            except (Exception, SystemExit, TimeIsUp) as error:
                if not isinstance(error, (AttemptError, TrainingError)) and not self.over:
                    with suppress(AttemptError):  # of the others; this one's comes first
                        self.gather(_Failure(f"{type(error).__name__}: {error}"))
                raise
            self.gather(None)  # who is last here may fail yet
        finally:
            self.attempting = outer

    def gather(self, value: T) -> list[T]:
        """Give the values of all processes, in their order; what they are can be pickled."""
        self._roll_call()
        values = self._gather(value)
        if self.attempting:
            for index, each in enumerate(values):
                if isinstance(each, _Failure):
                    raise AttemptError(f"process {index} of {self.count}: {each.text}")
        return values

    def from_main(self, value: T) -> T:
        """Give the main process's value, which alone is sent; it can be pickled."""
        self._roll_call()
        values = [value if self.main else None]
        self._connected(lambda: dist.broadcast_object_list(values, src=0))
        return cast("T", values[0])

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Make sure that what must be the same in all processes is.

        Raises:
            TrainingError: With what differs where.
        """
        everyone = self.gather(dict(facts))
        for index, others in enumerate(everyone):
            different = [name for name in everyone[0] if others.get(name) != everyone[0][name]]
            if different:
                raise TrainingError(
                    f"process {index} of {self.count} has not the same {' and '.join(different)} "
                    f"as process 0: every process needs the same files, options and packages"
                )

    def add_up(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Add up the gradients of all processes, in place, and give the sums of other values.

        Args:
            parameters: What trains, the same in all processes.
            values: fp32 [n] each, of the same sizes in all processes.
        """
        sums = self._exchange.pack(parameters, values)
        self._roll_call()
        self._connected(lambda: dist.all_reduce(sums))
        return self._exchange.unpack(sums, parameters, values)

    def meet(self, meeting: Callable[[], R]) -> R:
        """Do what connects all processes beside these methods: an engine's own exchange."""
        self._roll_call()
        return self._connected(meeting)

    def to_main(self, tensor: Tensor) -> list[Tensor] | None:
        """Give the main process the tensors of all, alike in shape and on the CPU."""
        self._roll_call()
        parts = [torch.empty_like(tensor) for _ in range(self.count)] if self.main else None
        self._connected(lambda: dist.gather(tensor.contiguous(), parts))
        return parts

    def heard(self) -> tuple[signal.Signals | None, bool]:
        """Give what the last roll call heard: the same in every process."""
        save, self._save = self._save, False
        return self._stop, save

    def _roll_call(self, error: Exception | None = None) -> None:
        """Meet the others, each saying what was signalled to it and whether its work failed.

        Raises:
            TrainingError: If another process failed, or is gone.
            UserError: If another process found the user's input wrong.
        """
        word = torch.tensor([error is not None, *self._signalled()], dtype=torch.int64)
        self._connected(lambda: dist.all_reduce(word))
        self.entangled = False  # all have come here
        failed, interrupts, terminations, saves = word.tolist()
        self._stop = signal.SIGTERM if terminations else signal.SIGINT if interrupts else None
        self._save |= bool(saves)
        if failed:
            self.over = True
            told = self._gather(None if error is None else _Told.of(error))
            if error is None:
                self._raise_first(told)

    def _signalled(self) -> tuple[bool, bool, bool]:
        if self._signals is None:
            return False, False, False
        stop = self._signals.received
        return (
            stop == signal.SIGINT,
            stop == signal.SIGTERM,
            self._signals.take_save_request(),
        )

    def _raise_first(self, told: Sequence[_Told | None]) -> NoReturn:
        index, cause = next((i, each) for i, each in enumerate(told) if each is not None)
        if cause.problems:
            raise UserError(cause.problems)
        error = TrainingError(f"process {index} of {self.count}: {cause.text}")
        for note in cause.notes:
            error.add_note(note)
        raise error

    def _gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.count
        self._connected(lambda: dist.all_gather_object(values, value))
        return values

    def _leave(self, error: Exception) -> None:
        """Say what ended the run to the others, who wait for this process and not for a word.

        Raises:
            LostConnectionError: If the error is that one of the others has left.
        """
        if _is_of_connection(error):
            self._lose(error)
        word = f"process {self.index} of {self.count}: {_Told.of(error).text}"
        self.over = True
        with suppress(RuntimeError):
            self._store.set(_WORD, word)
            if self.main:
                self._store.set(_MAIN_LIVES, "")

    def _connected(self, meeting: Callable[[], R]) -> R:
        try:
            return meeting()
        except RuntimeError as error:  # what torch raises whenever a connection breaks
            self._lose(error)

    def _lose(self, error: Exception) -> NoReturn:
        self.over = self._lost = True
        logger.debug("%s", error)
        said = "the connection to another process is lost: it was killed, or its machine is out "
        said += "of reach"
        if "timed out" in str(error).lower():
            minutes = self._timeout.total_seconds() / 60
            said = f"another process has not answered for {minutes:g} minutes (--ddp_timeout)"
        with suppress(RuntimeError):  # the store may be what was lost
            if self.main:
                self._store.set(_MAIN_LIVES, "")
            if self.entangled and self._store.check([_WORD]):
                said = self._store.get(_WORD).decode()
        lost = LostConnectionError(said)
        for note in getattr(error, "__notes__", ()):
            lost.add_note(note)
        raise lost from error

    def _speaks_for_main(self) -> bool:
        """Tell whether the main process is the one that is lost, and this one says so for all."""
        try:
            self._store.wait([_MAIN_LIVES], _SIGN_OF_LIFE)
        except RuntimeError:  # none in that time, or it held the store
            with suppress(RuntimeError):
                return self._store.add("spoken for main", 1) == 1
            return self.index == 1
        return False

    def _part(self) -> None:
        """Wait until every process has done what an error leaves to do: the main one saves."""
        if not (self._lost or self.entangled):
            try:
                dist.all_reduce(torch.zeros(1))
            except RuntimeError as error:
                logger.debug("%s", error)


def join(options: ProcessOptions) -> Ranks:
    """Meet the other processes that were launched, if any."""
    here = launched()
    if here.count == 1:
        return ALONE
    timeout = default_pg_timeout
    if options.ddp_timeout is not None:
        timeout = timedelta(minutes=options.ddp_timeout)
    if not dist.is_initialized():
        store, index, count = next(rendezvous("env://", here.index, here.count, timeout=timeout))
        # A job that starts anew may find the addresses of its earlier processes in the store.
        again = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # Without a named backend CPU tensors go over gloo, those of a GPU over its own.
        dist.init_process_group(store=again, rank=index, world_size=count, timeout=timeout)
    views, static = options.ddp_gradient_as_bucket_view, options.ddp_static_graph
    return SeveralRanks(FlatExchange(views=views, static=static), timeout)


def _is_of_connection(error: Exception) -> bool:
    """Tell whether an error is of a broken connection; gloo's have no type of their own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def digest(tensors: Sequence[Tensor]) -> str:
    """Give a hash of the values of tensors."""
    total = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
