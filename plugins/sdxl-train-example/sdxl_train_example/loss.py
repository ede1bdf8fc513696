"""A loss that grows like the square for small errors and like the distance for large ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import Field, Loss

if TYPE_CHECKING:
    from sdxl_train import LossFunction, NoiseSchedule
    from torch import Tensor


class ExampleLoss(Loss):
    """``c**2 (sqrt(1 + (error / c)**2) - 1)``, the pseudo-Huber loss (Charbonnier et al. 1997)."""

    example_c: float = Field(1.0, gt=0, description="Error at which squares become distances.")

    def build(self, schedule: NoiseSchedule) -> LossFunction:
        """Build the loss by element."""
        c = self.example_c

        def loss(prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
            return c**2 * ((1 + ((prediction - target) / c) ** 2).sqrt() - 1)

        return loss
