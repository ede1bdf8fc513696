"""Transforms of the training noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import Field, Noise

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from sdxl_train import NoiseSchedule, NoiseTransform


class NoiseOffset(Noise):
    """Offset noise: a random shift of each channel, so that brightness is learned too.

    ``noise + s * z`` with ``z ~ N(0, 1)`` of shape [B, C, 1, 1] (Guttenberg 2023, "Diffusion with
    Offset Noise").
    """

    noise_offset: float = Field(
        0.0, ge=0, description="Strength of the offset, about 0.0357 for SDXL. 0 = off."
    )

    def active(self) -> bool:
        """Tell whether there is any offset."""
        return self.noise_offset > 0

    def build(self, schedule: NoiseSchedule) -> NoiseTransform:
        """Build the transform."""
        import torch

        def transform(
            noise: Tensor, latents: Tensor, timesteps: Tensor, generator: Generator
        ) -> Tensor:
            batch, channels, *_ = noise.shape
            shift = torch.randn(batch, channels, 1, 1, generator=generator, device=noise.device)
            return noise + self.noise_offset * shift

        return transform
