"""A weight that falls with the noise of the timestep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import Field, Weighting

if TYPE_CHECKING:
    from sdxl_train import NoiseSchedule, WeightFunction
    from torch import Tensor


class ExampleWeighting(Weighting):
    """``(SNR / (SNR + 1)) ** power``: the share of signal at the timestep."""

    example_signal_power: float = Field(0.0, ge=0, description="Exponent; 0 is off.")

    def active(self) -> bool:
        """Tell whether the weights are other than 1."""
        return self.example_signal_power > 0

    def build(self, schedule: NoiseSchedule) -> WeightFunction:
        """Build ``timesteps [B] -> weights [B]``."""

        def weight(timesteps: Tensor) -> Tensor:
            share = schedule.alphas_cumprod[timesteps].clamp(min=1e-6)
            return share**self.example_signal_power

        return weight
