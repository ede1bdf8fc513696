"""Which of how many processes this is, as the one that launched it says. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

# torchrun and accelerate set the first of each; MPI launchers the others.
_INDEX = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_INDEX = (
    "LOCAL_RANK",
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
)
_LOCAL_COUNT = (
    "LOCAL_WORLD_SIZE",
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The place of this process among those that train together.

    Attributes:
        index: Its number; 0 is the main process, which writes and speaks.
        count: How many there are.
        local_index: Its number on this machine.
        local_count: How many there are on this machine.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0
    local_count: int = 1

    @property
    def main(self) -> bool:
        """Tell whether this is the process that writes and speaks."""
        return self.index == 0


def launched() -> Launch:
    """Read the environment that the launcher made; without one there is one process."""
    count = _number(_COUNT, 1)
    # A single process may have been launched so too; it has nobody to meet.
    if count == 1:
        return Launch()
    return Launch(
        index=_number(_INDEX, 0),
        count=count,
        local_index=_number(_LOCAL_INDEX, 0),
        local_count=_number(_LOCAL_COUNT, 1),
    )


def left_alone() -> bool:
    """Tell whether accelerate's launcher was asked for several processes and started only this one.

    So it does where it finds fewer than two GPUs and is not told ``--multi_gpu``. It then says how
    the processes would meet, and nothing of how many they are.
    """
    from_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    return from_accelerate and not any(os.environ.get(name) for name in (*_INDEX, *_COUNT))


def _number(names: tuple[str, ...], default: int) -> int:
    texts = (os.environ.get(name, "") for name in names)
    return next((int(text) for text in texts if text.isdecimal()), default)
