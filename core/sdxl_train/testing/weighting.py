"""The contract of weightings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdxl_train.components import Weighting
from sdxl_train.testing.functions import TensorFunctionContract

if TYPE_CHECKING:
    from torch import Tensor

    from sdxl_train.schedule import NoiseSchedule


class WeightingContract(TensorFunctionContract[Weighting]):
    """A weight for each sample: positive and finite, decided by its timestep alone."""

    def inputs(self, schedule: NoiseSchedule, device: str) -> tuple[Tensor, ...]:
        """Give every timestep of the schedule."""
        return (torch.arange(schedule.num_timesteps, device=device),)

    def test_weights_are_positive_and_finite_everywhere(self) -> None:
        """Every timestep has a weight: fp32 [B], above 0, finite."""
        for schedule in self.schedules():
            weights = self.call(schedule)
            assert weights.shape == (schedule.num_timesteps,)
            assert weights.dtype == torch.float32
            assert torch.isfinite(weights).all(), "a weight is not finite"
            assert (weights > 0).all(), "a weight is not positive"

    def test_weight_depends_on_the_timestep_alone(self) -> None:
        """Neither the order nor the company of a sample changes its weight."""
        for schedule in self.schedules():
            weight = self.make().build(schedule)
            weights = self.call(schedule)
            order = torch.tensor([700, 3, 3, 999, 0])
            assert torch.equal(weight(order), weights[order])
            assert torch.equal(weight(order[:1]), weights[order[:1]])
