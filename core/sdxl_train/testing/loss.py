"""The contract of losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdxl_train.components import Loss
from sdxl_train.testing.functions import (
    BATCH,
    CHANNELS,
    HEIGHT,
    WIDTH,
    TensorFunctionContract,
    normal,
    spread_timesteps,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sdxl_train.protocols import LossFunction
    from sdxl_train.schedule import NoiseSchedule

_ROUNDING = 1e-6


class LossContract(TensorFunctionContract[Loss]):
    """A distance by element: 0 where prediction and target agree, with a true gradient."""

    def inputs(self, schedule: NoiseSchedule, device: str) -> tuple[Tensor, ...]:
        """Give prediction, target and timesteps of a small batch."""
        return (
            normal(BATCH, CHANNELS, HEIGHT, WIDTH, device=device),
            normal(BATCH, CHANNELS, HEIGHT, WIDTH, device=device, seed=2),
            spread_timesteps(BATCH, schedule),
        )

    def test_loss_is_by_element_and_positive(self) -> None:
        """The loss of [B, C, h, w] is fp32 [B, C, h, w], never negative, and somewhere positive."""
        for schedule in self.schedules():
            prediction, target, timesteps = self.inputs(schedule, "cpu")
            loss = self.make().build(schedule)(prediction, target, timesteps)
            assert loss.shape == prediction.shape
            assert loss.dtype == torch.float32
            assert loss.min().item() >= -_ROUNDING, "the loss is negative"
            assert (loss.mean(dim=(1, 2, 3)) > _ROUNDING).all(), "a wrong prediction costs nothing"

    def test_loss_is_zero_at_equality(self) -> None:
        """A prediction that is right costs nothing and has nothing to learn."""
        for schedule in self.schedules():
            target, _, timesteps = self.inputs(schedule, "cpu")
            prediction = target.clone().requires_grad_()
            loss = self.make().build(schedule)(prediction, target, timesteps)
            assert loss.abs().max().item() <= _ROUNDING, "the loss of equal tensors is not 0"
            (gradient,) = torch.autograd.grad(loss.sum(), prediction)
            assert torch.isfinite(gradient).all(), "the gradient is not finite at equality"

    def test_large_errors_stay_finite(self) -> None:
        """Errors of all sizes give a finite loss and a finite gradient at every timestep."""
        for schedule in self.schedules():
            _, target, timesteps = self.inputs(schedule, "cpu")
            for size in (1e-6, 1.0, 1e4):
                prediction = (target + size).requires_grad_()
                loss = self.make().build(schedule)(prediction, target, timesteps)
                (gradient,) = torch.autograd.grad(loss.sum(), prediction)
                assert torch.isfinite(loss).all(), f"the loss of an error of {size:g}"
                assert torch.isfinite(gradient).all(), f"the gradient of an error of {size:g}"

    def test_gradient_is_that_of_the_loss(self) -> None:
        """The gradient equals the difference quotient, in fp64."""
        for schedule in self.schedules():
            timesteps = spread_timesteps(2, schedule)
            prediction = normal(2, CHANNELS, 4, 4).double().requires_grad_()
            target = normal(2, CHANNELS, 4, 4, seed=2).double()
            function: LossFunction = self.make().build(schedule)
            assert torch.autograd.gradcheck(
                lambda p, f=function, y=target, t=timesteps: f(p, y, t), (prediction,)
            )
