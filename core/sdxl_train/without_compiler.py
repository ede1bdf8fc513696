"""torch's optimizers without torch's compiler, which they import only to keep out of it.

That takes a second of the start of a run that compiles nothing. It is left to whoever compiles: a
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


class _NoCompiler(ModuleType):
    """Stands for the compiler while an optimizer steps; whoever asks for more gets it."""

    @staticmethod
    def graph_break() -> None:
        """Do what the compiler's function does where nothing is compiled: nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        sys.modules.pop(_NAME, None)
        return getattr(importlib.import_module(_NAME), name)


_STAND_IN: Final = _NoCompiler(_NAME)


def build_without_compiler(
    build: Callable[[], torch.optim.Optimizer],
) -> torch.optim.Optimizer:
    """Build an optimizer that does not import the compiler, unless somebody else has.

    Its methods, and ``torch.utils.checkpoint``, ask the compiler once for a form of themselves that
    is not compiled, and note it (``torch._compile``). Where there is no compiler, that is what they
    are.
    """
    if _NAME in sys.modules:
        return build()
    for function in (*vars(torch.optim.Optimizer).values(), torch.utils.checkpoint.checkpoint):
        if getattr(function, "__globals__", {}).get("__name__") == "torch._compile":
            function.__wrapped__.__dynamo_disable = function.__wrapped__
    optimizer = build()
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer.register_step_pre_hook(lambda *_: _enter())
        optimizer.register_step_post_hook(lambda *_: _leave())
    return optimizer


def _enter() -> None:
    sys.modules.setdefault(_NAME, _STAND_IN)


def _leave() -> None:
    if sys.modules.get(_NAME) is _STAND_IN:
        del sys.modules[_NAME]
