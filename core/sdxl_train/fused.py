"""Steps inside the backward pass (``--fused_backward_pass``): no two gradients are kept at once.

As soon as the gradient of a parameter is complete, the optimizer steps that parameter alone and
the gradient is freed. The norm of all gradients is known only when all steps are done, so each
gradient is clipped by its own norm, as sd-scripts does where it fuses.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch.optim import Optimizer


class FusedBackward:
    """Makes an optimizer step each of its parameters when its gradient is there.

    Args:
        optimizer: One that declares ``fused_backward``: stepping parameters one by one gives what
            stepping them together gives.
        max_norm: Limit to the norm of each gradient; 0 is none.
    """

    def __init__(self, optimizer: Optimizer, max_norm: float) -> None:
        self._optimizer = optimizer
        self._max_norm = max_norm or float("inf")
        self._norms: list[Tensor] = []
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._step, index))

    def grad_norm(self) -> Tensor:
        """Give the norm of all gradients since the last call, before clipping: an fp32 scalar."""
        norms, self._norms = self._norms, []
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def _step(self, group: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        norm = torch.nn.utils.clip_grad_norm_(parameter, self._max_norm)
        self._norms.append(norm.float())
        with self._alone(group, parameter):
            self._optimizer.step()
        parameter.grad = None

    @contextmanager
    def _alone(self, group: int, parameter: Tensor) -> Iterator[None]:
        """Show the optimizer one parameter: looking for gradients in all takes its time."""
        groups = self._optimizer.param_groups
        kept = [each["params"] for each in groups]
        for index, each in enumerate(groups):
            each["params"] = [parameter] if index == group else []
        try:
            yield
        finally:
            for each, parameters in zip(groups, kept, strict=True):
                each["params"] = parameters
