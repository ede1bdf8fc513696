"""How many bytes of tensors live at a time, and the most that did: operation by operation."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

_READ = torch.ops.aten._local_scalar_dense.default
"""Gives the number of a tensor without dimensions."""


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of tensors from their making to their end, those of temporaries too.

    A storage counts once, however many tensors view it. What an operation takes inside of its
    kernel is not seen. Within a ``FakeTensorMode`` tensors have no data: a number that is read of
    one is 1, which is true, finite, and divides.

    Args:
        device: Tensors elsewhere do not count.

    Attributes:
        now: Bytes that live.
        peak: The most that lived at once since :meth:`begin`.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were made elsewhere, and give the bytes that this adds."""
        before = self.now
        for tensor in tensors:
            self._see(tensor)
        return self.now - before

    def begin(self) -> None:
        """Forget the peak of before."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do the operation, and count what it gives."""
        if func is _READ and isinstance(args[0], FakeTensor) and args[0].constant is None:
            return _one(args[0].dtype)
        given = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(given):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return given

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._known:
            return
        size = storage.nbytes()
        self._known[place] = weakref.ref(storage, partial(self._forget, place, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, place: int, size: int, _: object) -> None:
        del self._known[place]
        self.now -= size


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1
