"""Lion."""

from __future__ import annotations

from typing import ClassVar

from sdxl_train import DecayRate, Field
from sdxl_train_optimizers.further import FromPytorchOptimizer


class Lion(FromPytorchOptimizer):
    """Lion: steps of one size, along the sign of a mean (Chen et al. 2023, algorithm 2).

    A third to a tenth of AdamW's rate is usual, and half of its memory is enough.
    """

    path: ClassVar[str] = "pytorch_optimizer.Lion"
    fused_backward: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.99), description="Shares of the running mean in a step, and in the next mean."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decay of the weights, times the rate.")
