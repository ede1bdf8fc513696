"""Noise with a random offset for each channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import Field, Noise

if TYPE_CHECKING:
    from sdxl_train import NoiseSchedule, NoiseTransform
    from torch import Generator, Tensor


class ExampleNoise(Noise):
    """Noise with a random offset for each channel of each sample."""

    example_offset: float = Field(
        0.0, ge=0, description="Standard deviation of the offset; 0 is off."
    )

    def active(self) -> bool:
        """Tell whether there is an offset."""
        return self.example_offset > 0

    def build(self, schedule: NoiseSchedule) -> NoiseTransform:
        """Build ``noise + offset * N(0, 1)``, one draw for each sample and channel."""
        import torch

        def transform(
            noise: Tensor, latents: Tensor, timesteps: Tensor, generator: Generator
        ) -> Tensor:
            shape = (*noise.shape[:2], 1, 1)
            offset = torch.randn(shape, generator=generator, device=noise.device)
            return noise + self.example_offset * offset

        return transform
