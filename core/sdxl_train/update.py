"""How the gradients of a step come about and become an update of what trains.

What the machine, the number of processes and the precision make of it is all here: the loop
calls the same methods for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdxl_train.assembly import WEIGHT_DTYPES
from sdxl_train.fused import FusedBackward
from sdxl_train.rounding import WideSteps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator
    from torch import Tensor
    from torch.nn import Parameter

    from sdxl_train.config import RunConfig
    from sdxl_train.ranks import Ranks


class Update:
    """Computes, adds up and clips the gradients of what an optimizer trains.

    Args:
        config: Asks for clipping, 16 bits, and steps inside the backward pass.
        accelerator: Scales the gradients of fp16.
        ranks: The processes whose gradients are added up.
        optimizer: What steps. Its schedule must exist already: accelerate takes note of the
            method ``step``, which a schedule replaces.
        parameters: What it trains, alike in all processes.

    Attributes:
        optimizer: What the loop steps: ``bare``, and the scaler of fp16 where there is one.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        ranks: Ranks,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Parameter],
    ) -> None:
        self.config = config.training
        self.accelerator = accelerator
        self.ranks = ranks
        self.parameters = parameters
        self.bare = optimizer
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self._fused = (
            FusedBackward(optimizer, self.config.max_grad_norm)
            if self.config.fused_backward_pass
            else None
        )
        self._wide_steps: WideSteps | None = None
        self._scale = 1.0

    @property
    def steps_in_backward(self) -> bool:
        """Whether the optimizer steps while gradients come in."""
        return self._fused is not None

    @property
    def may_skip(self) -> bool:
        """Whether a gradient scaler is at work, which skips steps that are not finite."""
        return self.accelerator.scaler is not None

    def keep_narrow(self, generator: Callable[[int], torch.Generator]) -> None:
        """Keep what trains in 16 bits from now on, if that is asked for.

        Args:
            generator: See :class:`.WideSteps`.
        """
        precision = self.config.trained_precision
        if precision != "no":
            self._wide_steps = WideSteps(self.bare, WEIGHT_DTYPES[precision], generator)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss to those that are there."""
        self.accelerator.backward(loss)

    def add_up(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Add up the gradients of all processes in place, and give the sums of ``values``."""
        if self._wide_steps is not None:
            self._wide_steps.widen()  # or small gradients would vanish, unscaled in fp16
        return self.ranks.add_up(self.parameters, values)

    def clip(self) -> Tensor:
        """Clip the gradients, and give their norm before: an fp32 scalar."""
        if self._fused is not None:
            return self._fused.grad_norm()
        if self.accelerator.scaler is not None:
            self._scale = self.accelerator.scaler.get_scale()
        self.accelerator.unscale_gradients(self.optimizer)
        limit = self.config.max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit)

    def was_skipped(self) -> bool:
        """Tell whether the gradient scaler left the last step without effect.

        It lowers its scale then. accelerate takes note of whether the optimizer was called, which
        fused ones are in any case: their kernels leave the weights alone.
        """
        scaler = self.accelerator.scaler
        skipped = scaler is not None and scaler.get_scale() < self._scale
        if skipped and self._wide_steps is not None:
            self._wide_steps.narrow()  # which no step has done
        return skipped
