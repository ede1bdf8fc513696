"""accelerate, which lives here and nowhere else: device, precision, gradient scaling."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import accelerate.optimizer
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, patch_environment

from sdxl_train.process_options import ENGINES

if TYPE_CHECKING:
    from sdxl_train.config import RunConfig


# It looks for this package on the disk twice in each step: a hundredth of a step of a tiny model.
accelerate.optimizer.is_lomo_available = functools.cache(accelerate.optimizer.is_lomo_available)


def make_accelerator(config: RunConfig) -> Accelerator:
    """Set up the device and the precision."""
    precision, device = config.training.mixed_precision, config.training.device
    # accelerate keeps one state for the process; a second run may want another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    # Engines that its configuration asks for are this run's options (see process_options.py).
    with patch_environment(**dict.fromkeys(ENGINES, "false")):
        return Accelerator(
            mixed_precision=precision,
            # Left to find out by itself that there is no accelerator, it would see one process.
            cpu=device == "cpu" or not torch.accelerator.is_available(),
            # Without it, accelerate's configuration would divide the loss once more.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
