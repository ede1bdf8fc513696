"""The forward process of a diffusion model: how much noise each timestep holds.

Notation as in Ho et al. 2020 (DDPM): ``abar_t`` is the cumulative product of ``1 - beta_t``,
``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise`` (eq. 4), and ``SNR_t = abar_t / (1 - abar_t)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

if TYPE_CHECKING:
    from torch import Tensor

PredictionType: TypeAlias = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """A discrete noise schedule and what the model predicts on it.

    Attributes:
        alphas_cumprod: ``abar_t``, fp32 [T], strictly falling, within [0, 1).
        prediction_type: ``epsilon`` (the noise) or ``v_prediction`` (the velocity).
        zero_terminal_snr: Whether the last ``abar_t`` is 0: a timestep of pure noise.
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType = "epsilon"
    zero_terminal_snr: bool = False

    @classmethod
    def scaled_linear(
        cls,
        *,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_timesteps: int = 1000,
        prediction_type: PredictionType = "epsilon",
    ) -> NoiseSchedule:
        """Make the schedule of Stable Diffusion: betas linear in their square roots."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2
        return cls(
            alphas_cumprod=torch.cumprod(1.0 - betas, dim=0), prediction_type=prediction_type
        )

    @property
    def num_timesteps(self) -> int:
        """Length T of the schedule."""
        return self.alphas_cumprod.shape[0]

    def with_zero_terminal_snr(self) -> NoiseSchedule:
        """Give the schedule shifted and scaled so that the last timestep is pure noise.

        ``sqrt(abar)`` less its last value, times what keeps the first one (Lin et al. 2024,
        "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1).
        """
        root = self.alphas_cumprod.sqrt()
        first, last = root[0], root[-1]
        abar = ((root - last) * first / (first - last)).square()
        return replace(self, alphas_cumprod=abar, zero_terminal_snr=True)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Give the same schedule with its table on ``device``."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def snr(self, timesteps: Tensor) -> Tensor:
        """Give the signal-to-noise ratio at timesteps [B]: fp32 [B]."""
        abar = self.alphas_cumprod[timesteps]
        return abar / (1.0 - abar)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Give ``x_t`` for latents and noise [B, C, h, w] at timesteps [B]."""
        signal, sigma = self._coefficients(timesteps)
        return signal * latents + sigma * noise

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Give ``v = sqrt(abar) noise - sqrt(1 - abar) x_0`` (Salimans & Ho 2022, appendix D)."""
        signal, sigma = self._coefficients(timesteps)
        return signal * noise - sigma * latents

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Give what a model of this prediction type should predict."""
        if self.prediction_type == "v_prediction":
            return self.velocity(latents, noise, timesteps)
        return noise

    def _coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return abar.sqrt(), (1.0 - abar).sqrt()
