"""torch's optimizers and recomputation without its compiler, which they import to keep out of it.

That takes a second and 60 MB of a run that compiles nothing. It is left to whoever compiles: a
model whose blocks are compiled has imported it before its optimizer is built.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.utils.checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

_NAME: Final = "torch._dynamo"


class _Config:
    """What recomputation reads of the compiler's configuration, as it is by default."""

    error_on_nested_fx_trace = True

    def __getattr__(self, name: str) -> Any:
        return getattr(_compiler().config, name)


class _NoCompiler(ModuleType):
    """Stands for the compiler where nothing is compiled; whoever asks for more gets it."""

    config = _Config()

    @staticmethod
    def graph_break() -> None:
        """Do what the compiler's function does where nothing is compiled: nothing."""

    @staticmethod
    def disable(*function: Callable[..., Any], **how: Any) -> Any:
        """Give a function as it is: nothing compiles it."""
        return (
            function[0] if len(function) == 1 and not how else _compiler().disable(*function, **how)
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_compiler(), name)


def _compiler() -> ModuleType:
    if sys.modules.get(_NAME) is _STAND_IN:
        del sys.modules[_NAME]
    return importlib.import_module(_NAME)


_STAND_IN: Final = _NoCompiler(_NAME)


def build_without_compiler(
    build: Callable[[], torch.optim.Optimizer],
) -> torch.optim.Optimizer:
    """Build an optimizer that does not import the compiler, unless somebody else has.

    Its methods, and functions of ``torch.utils.checkpoint``, ask the compiler once for a form of
    themselves that is not compiled, and note it (``torch._compile``). Where there is no compiler,
    that is what they are.
    """
    if _NAME in sys.modules:
        return build()
    for function in (*vars(torch.optim.Optimizer).values(), *vars(torch.utils.checkpoint).values()):
        if getattr(function, "__globals__", {}).get("__name__") == "torch._compile":
            function.__wrapped__.__dynamo_disable = function.__wrapped__
    optimizer = build()
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer.register_step_pre_hook(lambda *_: _enter())
        optimizer.register_step_post_hook(lambda *_: _leave())
    return optimizer


def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function whose results are computed again in the backward pass.

    See :func:`torch.utils.checkpoint.checkpoint`, here without reentering autograd.
    """
    if _NAME not in sys.modules:
        # Read of torch in both passes. Who imports the compiler puts it in this place.
        vars(torch).setdefault("_dynamo", _STAND_IN)
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


def _enter() -> None:
    sys.modules.setdefault(_NAME, _STAND_IN)


def _leave() -> None:
    if sys.modules.get(_NAME) is _STAND_IN:
        del sys.modules[_NAME]
