"""Modules of shapes only, to be planned with or to be given the weights of a file."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.modeling_utils import no_init_weights
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


class _NumbersOnCpu(TorchFunctionMode):
    """Makes ranges where they cost nothing: on the meta device they import sympy."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        place = {"device": "cpu"} if func is torch.arange else {}
        return func(*args, **{**place, **(kwargs or {})})


@contextmanager
def without_weights() -> Iterator[None]:
    """Build modules on the meta device, whose initialisers would take long for nothing."""
    with torch.device("meta"), _NumbersOnCpu(), no_init_weights():
        yield
