"""accelerate, which lives here and nowhere else: device, precision, gradient scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

if TYPE_CHECKING:
    from sdxl_train.config import RunConfig


def make_accelerator(config: RunConfig) -> Accelerator:
    """Set up the device and the precision."""
    precision, device = config.training.mixed_precision, config.training.device
    # accelerate keeps one state for the process; a second run may want another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        mixed_precision=precision,
        # Left to find out by itself that there is no accelerator, it would see one process only.
        cpu=device == "cpu" or not torch.accelerator.is_available(),
        # Without it, accelerate's configuration would divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
