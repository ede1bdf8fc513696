"""Distances between prediction and target, by element."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from sdxl_train import Field, Loss

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


class L1(Loss):
    """Absolute error: ``|prediction - target|``."""

    def build(self, schedule: NoiseSchedule) -> LossFunction:
        """Build the loss."""

        def loss(prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
            return (prediction - target).abs()

        return loss


class LogCosh(Loss):
    """``log(cosh(e))`` of the error ``e``: half its square when small, its size when large.

    Computed as ``|e| + log(1 + exp(-2 |e|)) - log(2)``, which does not overflow.
    """

    def build(self, schedule: NoiseSchedule) -> LossFunction:
        """Build the loss."""
        import math

        import torch.nn.functional as F

        def loss(prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
            size = (prediction - target).abs()
            return size + F.softplus(-2.0 * size) - math.log(2.0)

        return loss


class _PseudoHuber(Loss):
    """Pseudo-Huber (Charbonnier et al. 1997): quadratic for errors below ``c``, linear above.

    ``c`` may depend on the timestep (Khrapov et al. 2024, "Improving Diffusion Models's Data-
    Corruption Resistance using Scheduled Pseudo-Huber Loss"). With h = huber_c and s = huber_scale:

    * constant: ``c = s h``
    * exponential: ``c = s h^(t / T)``
    * snr: ``c = s ((1 - h) / (1 + sigma)^2 + h)``, where ``sigma = sqrt((1 - abar) / abar)``
    """

    huber_c: float = Field(
        0.1, gt=0, description="Error where quadratic turns linear; with a schedule, at its end."
    )
    huber_scale: float = Field(1.0, gt=0, description="Factor of that error, in every schedule.")
    huber_schedule: Literal["constant", "exponential", "snr"] = Field(
        "snr", description="How that error falls from clean to noisy timesteps."
    )

    def build(self, schedule: NoiseSchedule) -> LossFunction:
        """Build the loss."""

        def loss(prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
            c = self.threshold(schedule, timesteps).view(-1, 1, 1, 1)
            error = prediction - target
            return self._factor(c) * ((error.square() + c.square()).sqrt() - c)

        return loss

    def threshold(self, schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
        """Give ``c`` at timesteps [B]: fp32 [B]."""
        import torch

        abar = schedule.alphas_cumprod[timesteps]
        if self.huber_schedule == "constant":
            return torch.full_like(abar, self.huber_scale * self.huber_c)
        if self.huber_schedule == "exponential":
            return self.huber_scale * self.huber_c ** (timesteps / schedule.num_timesteps)
        sigma = ((1.0 - abar) / abar).sqrt()
        return self.huber_scale * ((1.0 - self.huber_c) / (1.0 + sigma).square() + self.huber_c)

    @abstractmethod
    def _factor(self, c: Tensor) -> Tensor:
        """Give what the loss is multiplied by, [B, 1, 1, 1]."""


class Huber(_PseudoHuber):
    """Pseudo-Huber loss ``2 c (sqrt(e^2 + c^2) - c)``: quadratic for errors below c, then linear.

    As strong as ``l2`` for small errors. For c, see ``huber_schedule``.
    """

    def _factor(self, c: Tensor) -> Tensor:
        return 2.0 * c


class SmoothL1(_PseudoHuber):
    """Smooth L1 loss ``2 (sqrt(e^2 + c^2) - c)``: the pseudo-Huber loss without the factor c.

    Twice as strong as ``l1`` for large errors. For c, see ``huber_schedule``.
    """

    def _factor(self, c: Tensor) -> Tensor:
        import torch

        return torch.full_like(c, 2.0)
