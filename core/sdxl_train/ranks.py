"""What a run asks of the processes that train together, and the answers of one that is alone.

A run of N processes with batches of B is the run of one process with batches of N x B: each process
has a contiguous part of every batch, and draws what one process would draw for that part. Once a
step they add up their gradients, in one flat all-reduce. Adapters are made of the seed, alike in
every process; frozen weights are read by each, and never sent.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TypeVar

from sdxl_train.errors import SdxlTrainError

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from sdxl_train.signals import RunSignals

T = TypeVar("T")
R = TypeVar("R")


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
    over = False
    """The run has failed, and every process is about to leave."""
    attempting = False
    """Inside of :meth:`attempt`, where all processes do the same."""
    entangled = False
    """The processes wait for each other in other ways than these, until they next meet."""
    _signals: RunSignals | None = None

    @property
    def main(self) -> bool:
        """Tell whether this is the process that writes and speaks."""
        return self.index == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error inside end the run in every process."""
        yield

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Let an error inside end in every process what all of them attempt, and not the run."""
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

    def meet(self, meeting: Callable[[], R]) -> R:
        """Do what connects all processes beside these methods: an engine's own exchange."""
        return meeting()

    def to_main(self, tensor: Tensor) -> list[Tensor] | None:
        """Give the main process the tensors of all, alike in shape and on the CPU."""
        return [tensor]

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


class ShareOut(Protocol):
    """Deals work to all processes; see :meth:`Ranks.share_out`."""

    def __call__(self, work: Sequence[T], do: Callable[[Sequence[T]], Iterator[R]]) -> Iterator[R]:
        """Give the results of all processes."""


class AttemptError(SdxlTrainError):
    """What all processes attempted together failed in another one."""
