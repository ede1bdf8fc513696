"""Weights of a sample's loss by its timestep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import Field, Weighting

if TYPE_CHECKING:
    from torch import Tensor

    from sdxl_train import NoiseSchedule, WeightFunction


class MinSnr(Weighting):
    """Min-SNR-gamma: early, nearly clean timesteps count less (Hang et al. 2023, eq. 9).

    ``min(SNR, gamma) / SNR`` for noise prediction, ``min(SNR, gamma) / (SNR + 1)`` for velocity.
    """

    min_snr_gamma: float = Field(0.0, ge=0, description="Gamma, usually 5. 0 = off.")

    def active(self) -> bool:
        """Tell whether there is any weighting."""
        return self.min_snr_gamma > 0

    def build(self, schedule: NoiseSchedule) -> WeightFunction:
        """Build the weight function."""
        offset = 1.0 if schedule.prediction_type == "v_prediction" else 0.0

        def weight(timesteps: Tensor) -> Tensor:
            snr = schedule.snr(timesteps)
            return snr.clamp(max=self.min_snr_gamma) / (snr + offset)

        return weight
