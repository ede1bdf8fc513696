"""Tensors on their way between the CPU and a GPU, for which nobody waits.

A plain copy between the two waits until the GPU has done all that it was told before. From pinned
memory, which the system leaves where it is, the GPU reads by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def sent(tensor: Tensor, device: torch.device, *, pinned: bool = True) -> Tensor:
    """Give a tensor on ``device``; if pinned, the copy is queued there like any other work."""
    if pinned and device.type == "cuda" and tensor.device.type == "cpu":
        # torch gives the pinned memory to nobody else before the copy is done.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Fetched:
    """A bool [] that is on its way to the CPU behind the work that is queued now."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrival: torch.cuda.Event | None = None
        self._tensor = tensor.to("cpu", non_blocking=True)
        if tensor.is_cuda:
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()

    def value(self) -> bool:
        """Give the value; waits for it, and for no work that was queued after it."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return bool(self._tensor)
