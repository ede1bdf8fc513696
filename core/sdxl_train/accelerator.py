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
        UserError: If this machine cannot do what the options ask.
    """
    precision, device = config.training.mixed_precision, config.training.device
    missing = (device == "cuda" and not torch.cuda.is_available()) or (
        device == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise UserError.of(
            config.place("device"),
            f"there is no {device} device on this machine, or this torch cannot use it",
            "use --device auto or cpu, or install a torch built for it",
        )
    if precision == "fp16" and (device == "cpu" or not torch.cuda.is_available()):
        raise UserError.of(
            config.place("mixed_precision"),
            "fp16 needs a GPU, and this run has none",
            "use --mixed_precision bf16 or no",
        )
    # accelerate keeps one state for the process; a second run may want another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        mixed_precision=precision,
        # Left to find out by itself that there is no accelerator, it would not join processes.
        cpu=device == "cpu" or not torch.accelerator.is_available(),
        # Without it, accelerate's configuration would divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
