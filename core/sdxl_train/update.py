"""How the gradients of a step come about and become an update of what trains.

What the machine, the number of processes and the precision make of it is all here: the loop
calls the same methods for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sdxl_train.assembly import WEIGHT_DTYPES
from sdxl_train.components import LimitedNetwork
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

    whole = True
    """Whether each process has the optimizer's whole state, and can save it alone."""

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        ranks: Ranks,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Parameter],
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.ranks = ranks
        self.parameters = parameters
        self.bare = optimizer
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self._fused = (
            FusedBackward(optimizer, self.config.training.max_grad_norm)
            if self.config.training.fused_backward_pass
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

    def why_at_once(self) -> str | None:
        """Say why each step must be known to be finite before it is taken.

        None where that may wait until the gradients of the next step are queued.
        """
        config, network = self.config, self.config.network
        limits = isinstance(network, LimitedNetwork) and network.scale_weight_norms is not None
        reasons = {
            "there is no GPU to be kept busy": self.accelerator.device.type != "cuda",
            "--check_late is false": not config.training.check_late,
            # torch's mark of kernels that do nothing when its scaler finds a gradient not finite.
            "the optimizer cannot hold a step back by itself": not getattr(
                self.bare, "_step_supports_amp_scaling", False
            ),
            "the optimizer steps in the backward pass": self.steps_in_backward,
            "the scaler of fp16 waits too": self.may_skip,
            "processes wait for each other": self.ranks.count > 1,
            "CUDA graphs would write over the next gradients": config.model.reuses_memory,
            "scale_weight_norms would act twice": limits,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def hold_back(self, finite: Tensor) -> None:
        """Let the optimizer take its next step only if a bool [] on the device is true."""
        self.bare.found_inf = (~finite).float()  # type: ignore[attr-defined]

    def begin(self, generator: Callable[[int], torch.Generator]) -> None:
        """Begin where weights and optimizer are; keep what trains in 16 bits, if that is asked for.

        Args:
            generator: See :class:`.WideSteps`.
        """
        precision = self.config.training.trained_precision
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
        limit = self.config.training.max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit)

    def collect(self) -> None:
        """Make ready for :meth:`state_dict`: all processes do it before the main one saves."""

    def state_dict(self) -> dict[str, Any]:
        """Give the state of the whole optimizer, as torch's optimizers give theirs."""
        return self.bare.state_dict()

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


def make_update(
    config: RunConfig,
    accelerator: Accelerator,
    ranks: Ranks,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Parameter],
) -> Update:
    """Give what computes the updates of a run; the arguments are those of :class:`Update`."""
    if config.processes.deepspeed:
        from sdxl_train.zero import ZeroUpdate

        return ZeroUpdate(config, accelerator, ranks, optimizer, parameters)
    return Update(config, accelerator, ranks, optimizer, parameters)
