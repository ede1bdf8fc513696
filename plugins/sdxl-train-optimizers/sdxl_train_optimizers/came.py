"""CAME."""

from __future__ import annotations

from typing import ClassVar

from sdxl_train import DecayRate, Field
from sdxl_train_optimizers.further import FromPytorchOptimizer


class Came(FromPytorchOptimizer):
    """CAME: Adafactor's memory, with steps weighted by confidence (Luo et al. 2023, algorithm 2).

    The squared gradients of a matrix are kept as the means of its rows and columns.
    """

    path: ClassVar[str] = "pytorch_optimizer.CAME"
    fused_backward: ClassVar[bool] = True

    betas: tuple[DecayRate, DecayRate, DecayRate] = Field(
        (0.9, 0.999, 0.9999),
        description="Decay of the means of steps, squared gradients and squared instability.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decay of the weights, times the rate.")
    clip_threshold: float = Field(1.0, gt=0, description="Largest root mean square of a step.")
    ams_bound: bool = Field(False, description="Divide by the largest second moment so far.")
    eps1: float = Field(1e-30, ge=0, description="Added to squared gradients.")
    eps2: float = Field(1e-16, ge=0, description="Added to the squared instability.")
