"""The processes that train together, and everything that they agree on.

A run of N processes with batches of B is the run of one process with batches of N x B: each process
has a contiguous part of every batch, and draws what one process would draw for that part. Once a
step they add up their gradients, in one flat all-reduce. Adapters are made of the seed, alike in
every process; frozen weights are read by each, and never sent.

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
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sdxl_train.errors import EndedElsewhereError, Problem, TrainingError, UserError
from sdxl_train.launch import launched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from sdxl_train.signals import RunSignals

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)


class Ranks:
    """A process that trains alone: whatever is to be agreed on, it agrees.

    Attributes:
        index: Number of this process; 0 is the main one, which writes files and tells observers.
        count: How many there are.
    """

    index = 0
    count = 1
    patience = 0.0
    """Seconds in which signals count as one; see :class:`.RunSignals`."""
    _signals: RunSignals | None = None

    @property
    def main(self) -> bool:
        """Tell whether this is the process that writes and speaks."""
        return self.index == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error inside end the run in every process."""
        yield

    def gather(self, value: T) -> list[T]:
        """Give the values of all processes, in their order."""
        return [value]

    def share_out(self, work: Sequence[T], do: Callable[[Sequence[T]], Iterator[R]]) -> Iterator[R]:
        """Deal pieces of work to the processes; give every process all results, as they come.

        Args:
            work: The pieces, the same in all processes.
            do: Gives one result for each piece that is dealt to this process.
        """
        results = do(work[self.index :: self.count])
        for _ in range(0, len(work), self.count):
            yield from (found[0] for found in self.gather([*islice(results, 1)]) if found)

    def from_main(self, value: T) -> T:
        """Give the main process's value."""
        return self.gather(value)[0]

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Make sure that what must be the same in all processes is.

        Raises:
            TrainingError: With what differs where.
        """

    def add_up(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Add up the gradients of all processes, in place, and give the sums of other values."""
        return values

    def listen(self, signals: RunSignals) -> None:
        """Say from now on in roll calls what is signalled to this process."""
        self._signals = signals

    def stopping(self) -> bool:
        """Tell whether this process was asked to stop; the others may learn of it later."""
        return self._signals is not None and self._signals.received is not None

    def heard(self) -> tuple[signal.Signals | None, bool]:
        """Give the signal that ends the run, if any, and whether a save was asked for."""
        signals = self._signals
        return (signals.received, signals.take_save_request()) if signals else (None, False)


ALONE = Ranks()


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


class SeveralRanks(Ranks):
    """One of several processes."""

    patience = 3.0

    def __init__(self) -> None:
        self.index = dist.get_rank()
        self.count = dist.get_world_size()
        self._stop: signal.Signals | None = None
        self._save = False
        self._over = False
        self._lost = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error inside end the run in every process; leave when all have come to the end."""
        try:
            try:
                yield
            except Exception as error:
                if not self._over:
                    with suppress(TrainingError):  # of the others; this one's comes first
                        self._roll_call(error)
                raise
            # Who is last here may fail yet: the others wait for it.
            self._roll_call()
        except Exception as error:
            self._part()
            if self.main:
                raise
            raise EndedElsewhereError("another process says what ended the run") from error

    def gather(self, value: T) -> list[T]:
        """Give the values of all processes, in their order; what they are can be pickled."""
        self._roll_call()
        return self._gather(value)

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

        All that is sent is one fp32 tensor: every gradient, a flag for each that says whether there
        is one, and the values. A parameter that no process has a gradient for stays without.

        Args:
            parameters: What trains, the same in all processes.
            values: fp32 [n] each, of the same sizes in all processes.
        """
        self._roll_call()
        device = parameters[0].device
        gradients = [p.grad for p in parameters]
        present = torch.tensor([g is not None for g in gradients], dtype=torch.float32)
        sums = torch.cat(
            [
                *(
                    (torch.zeros_like(p) if g is None else g).flatten().float()
                    for p, g in zip(parameters, gradients, strict=True)
                ),
                present.to(device),
                *(value.to(device) for value in values),
            ]
        )
        self._connected(lambda: dist.all_reduce(sums))
        sizes = [parameter.numel() for parameter in parameters]
        gradient_sums, flags, value_sums = sums.split_with_sizes(
            [sum(sizes), len(sizes), sum(value.numel() for value in values)]
        )
        anywhere = present.tolist() if present.all() else flags.tolist()
        summed = gradient_sums.split_with_sizes(sizes)
        for parameter, total, is_there in zip(parameters, summed, anywhere, strict=True):
            if is_there:
                total = total.view_as(parameter).to(parameter.dtype)
                if parameter.grad is None:
                    parameter.grad = total.clone()
                else:
                    parameter.grad.copy_(total)
        return value_sums.clone().split_with_sizes([value.numel() for value in values])

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
        failed, interrupts, terminations, saves = word.tolist()
        self._stop = signal.SIGTERM if terminations else signal.SIGINT if interrupts else None
        self._save |= bool(saves)
        if failed:
            self._over = True
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

    def _connected(self, meeting: Callable[[], object]) -> None:
        try:
            meeting()
        except RuntimeError as error:  # what torch raises whenever a connection breaks
            self._over = self._lost = True
            logger.debug("%s", error)
            raise TrainingError(
                "the connection to another process is lost: it was killed, or its machine is out "
                "of reach"
            ) from error

    def _part(self) -> None:
        """Wait until every process has done what an error leaves to do: the main one saves."""
        if not self._lost:
            try:
                dist.all_reduce(torch.zeros(1))
            except RuntimeError as error:
                logger.debug("%s", error)


def join(timeout_minutes: int | None = None) -> Ranks:
    """Meet the other processes that were launched, if any.

    Args:
        timeout_minutes: How long to wait for one that does not come. Default: torch's own limit.
    """
    here = launched()
    if here.count == 1:
        return ALONE
    if not dist.is_initialized():
        timeout = default_pg_timeout
        if timeout_minutes is not None:
            timeout = timedelta(minutes=timeout_minutes)
        store, index, count = next(rendezvous("env://", here.index, here.count, timeout=timeout))
        # A job that starts anew may find the addresses of its earlier processes in the store.
        again = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # Without a named backend CPU tensors go over gloo, those of a GPU over its own.
        dist.init_process_group(store=again, rank=index, world_size=count, timeout=timeout)
    return SeveralRanks()


def digest(tensors: Sequence[Tensor]) -> str:
    """Give a hash of the values of tensors."""
    total = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
