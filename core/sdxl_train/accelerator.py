"""accelerate, which lives here and nowhere else: device, precision, gradient scaling, processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from sdxl_train.errors import UserError

if TYPE_CHECKING:
    from sdxl_train.config import RunConfig


def make_accelerator(config: RunConfig) -> Accelerator:
    """Set up the device and the precision, and meet the other processes, if any were launched.

    Raises:
        UserError: If the options do not go with several processes.
    """
    precision, device = config.training.mixed_precision, config.training.device
    # accelerate keeps one state for the process; a second run may want another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision=precision,
        # Left to find out by itself that there is no accelerator, it would not join processes.
        cpu=device == "cpu" or not torch.accelerator.is_available(),
        # Without it, accelerate's configuration would divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if accelerator.num_processes > 1 and config.training.fused_backward_pass:
        raise UserError.of(
            config.place("fused_backward_pass"),
            f"does not go with {accelerator.num_processes} processes: gradients that are freed at "
            "once cannot be added up",
            "train with one process, or leave it out",
        )
    return accelerator
