"""The heap of the C library, in which tensors on a CPU live."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
"""Numbers of mallopt(3)."""
_LARGE: Final = 2 << 20


def give_back_large_blocks() -> None:
    """Let blocks of 2 MB and more be memory of their own, which goes back when they are freed.

    Once it has freed such a block, glibc takes the next ones from its heap, whose holes a process
    keeps. What is there for a moment between activations that stay, weights that are unpacked or
    blocks that are computed again, leaves holes of gigabytes there. Does nothing where the C
    library is another one.
    """
    if (mallopt := _of_glibc("mallopt")) is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)
        # Set too, for both stop to adapt; the top of the heap is not to come and go.
        mallopt(_TRIM_THRESHOLD, 32 * _LARGE)


def give_back_holes() -> None:
    """Give what is free in the heap back to the system: for when much was there for a moment.

    Does nothing where the C library is another one.
    """
    if (malloc_trim := _of_glibc("malloc_trim")) is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
