"""Distances between prediction and target, by element."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sdxl_train import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from sdxl_train import LossFunction, NoiseSchedule


class L2(Loss):
    """Squared error: ``(prediction - target)^2``."""

    default: ClassVar[bool] = True

    def build(self, schedule: NoiseSchedule) -> LossFunction:
        """Build the loss."""

        def loss(prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
            return (prediction - target).square()

        return loss
