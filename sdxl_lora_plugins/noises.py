"""Transforms of the training noise, each [B, C, h, w] to the same shape.

They apply in the order of their registration. Every draw is from the generator that is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from sdxl_lora_plugins.assignment import cheapest_assignment
from sdxl_train import Field, Noise, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Generator, Tensor

    from sdxl_train import NoiseSchedule, NoiseTransform, RunConfig


def _required(noise: Noise, strength: str, usual: str, config: RunConfig) -> Iterator[Problem]:
    """Refuse what only makes sense beside a strength, if nobody set the strength."""
    # One that was given and is no strength is a problem of its own.
    if strength in noise.model_fields_set or config.is_set(strength):
        return
    # Chosen by name, none of its options may be set.
    given = [config.place(name) for name in sorted(noise.model_fields_set)] or ["--noise"]
    yield Problem(
        place=", ".join(given),
        message=f"has no effect without --{strength}",
        remedy=f"add --{strength} {usual}, or leave the other out",
    )


class Immiscible(Noise):
    """Immiscible noise: each image of a batch gets the noise near to it (Li et al. 2024).

    The noises of a batch are dealt out so that the sum of distances ``|noise_j - latents_i|`` is
    least ("Immiscible Diffusion", algorithm 1). A batch of one stays as it is.
    """

    immiscible_noise: bool = Field(
        False, description="Pair the noises of a batch with its nearest images."
    )

    def active(self) -> bool:
        """Tell whether there is any pairing; to name it is to ask for it."""
        return self.immiscible_noise or "immiscible_noise" not in self.model_fields_set

    def build(self, schedule: NoiseSchedule) -> NoiseTransform:
        """Build the transform."""
        import torch

        def transform(
            noise: Tensor, latents: Tensor, timesteps: Tensor, generator: Generator
        ) -> Tensor:
            distances = torch.cdist(latents.flatten(1).float(), noise.flatten(1).float())
            return noise[cheapest_assignment(distances.tolist())]

        return transform


class NoiseOffset(Noise):
    """Offset noise: a random shift of each channel, so that brightness is learned too.

    ``noise + s z`` with ``z ~ N(0, 1)`` of shape [B, C, 1, 1] (Guttenberg 2023, "Diffusion with
    Offset Noise"). A random strength takes ``s u`` with one ``u ~ U(0, 1)`` for the batch; the
    adaptive scale ``a`` then takes ``max(0, s + a |mean of the channel of the latents|)``.
    """

    noise_offset: float = Field(
        0.0, ge=0, description="Strength of the offset, about 0.0357 for SDXL. 0 = off."
    )
    noise_offset_random_strength: bool = Field(
        False, description="Take a random strength up to noise_offset in each batch."
    )
    adaptive_noise_scale: float | None = Field(
        None, description="Add this times the size of the latents' mean to the strength."
    )

    def active(self) -> bool:
        """Tell whether there is any offset; without a word about it, :meth:`check` asks for it."""
        return self.noise_offset > 0 or "noise_offset" not in self.model_fields_set

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse an offset that nobody set."""
        return _required(self, "noise_offset", "0.0357", config)

    def build(self, schedule: NoiseSchedule) -> NoiseTransform:
        """Build the transform."""
        import torch

        def transform(
            noise: Tensor, latents: Tensor, timesteps: Tensor, generator: Generator
        ) -> Tensor:
            batch, channels, *_ = noise.shape
            shift = torch.randn(batch, channels, 1, 1, generator=generator, device=noise.device)
            return noise + self._strength(latents, generator) * shift

        return transform

    def _strength(self, latents: Tensor, generator: Generator) -> Tensor | float:
        import torch

        strength: Tensor | float = self.noise_offset
        if self.noise_offset_random_strength:
            strength = strength * torch.rand((), generator=generator, device=generator.device)
        if self.adaptive_noise_scale:
            mean = latents.mean(dim=(2, 3), keepdim=True).abs()  # [B, C, 1, 1]
            strength = (strength + self.adaptive_noise_scale * mean).clamp(min=0.0)
        return strength


class Multires(Noise):
    """Multi-resolution ("pyramid") noise: noise of ever coarser grids, each fainter than the last.

    ``noise + sum_i d^i up(z_i)``, divided by its standard deviation over the batch. ``z_i`` is
    normal on a grid ``r_i^i`` times smaller with ``r_i ~ U(2, 4)``, enlarged bilinearly; the last
    one is that with a side of 1 (Whitaker 2023, "Multi-Resolution Noise for Diffusion Model
    Training"). As in sd-scripts ``i`` starts at 0: a second noise of full size.
    """

    multires_noise_iterations: int = Field(
        0, ge=0, description="Grids of coarser noise to add, usually 6 to 10. 0 = off."
    )
    multires_noise_discount: float = Field(
        0.3, ge=0, le=1, description="Strength of each grid relative to the one before it."
    )

    def active(self) -> bool:
        """Tell whether there is coarser noise; without a word about it, :meth:`check` asks."""
        is_silent = "multires_noise_iterations" not in self.model_fields_set
        return self.multires_noise_iterations > 0 or is_silent

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse a discount of nothing."""
        return _required(self, "multires_noise_iterations", "6", config)

    def build(self, schedule: NoiseSchedule) -> NoiseTransform:
        """Build the transform."""
        import torch
        import torch.nn.functional as F

        def transform(
            noise: Tensor, latents: Tensor, timesteps: Tensor, generator: Generator
        ) -> Tensor:
            device = noise.device
            batch, channels, height, width = noise.shape
            # All ratios at once: reading them waits for the device.
            drawn = torch.rand(self.multires_noise_iterations, generator=generator, device=device)
            for i, ratio in enumerate((2.0 + 2.0 * drawn).tolist()):
                grid = max(1, int(height / ratio**i)), max(1, int(width / ratio**i))
                coarse = torch.randn(batch, channels, *grid, generator=generator, device=device)
                up = F.interpolate(coarse, size=(height, width), mode="bilinear")
                noise = noise + self.multires_noise_discount**i * up
                if 1 in grid:
                    break
            return noise / noise.std()

        return transform


class InputPerturbation(Noise):
    """Input perturbation: the latents get more noise than is to be predicted (Ning et al. 2023).

    ``noise + g z`` with ``z ~ N(0, 1)`` (algorithm 1), in the noisy latents only. A random
    strength takes ``g u`` with one ``u ~ U(0, 1)`` for the batch.
    """

    phase: ClassVar[Literal["target", "input"]] = "input"

    ip_noise_gamma: float = Field(
        0.0, ge=0, description="Strength of the perturbation, about 0.1. 0 = off."
    )
    ip_noise_gamma_random_strength: bool = Field(
        False, description="Take a random strength up to ip_noise_gamma in each batch."
    )

    def active(self) -> bool:
        """Tell whether there is any perturbation; without a word about it, :meth:`check` asks."""
        return self.ip_noise_gamma > 0 or "ip_noise_gamma" not in self.model_fields_set

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse a random share of nothing."""
        return _required(self, "ip_noise_gamma", "0.1", config)

    def build(self, schedule: NoiseSchedule) -> NoiseTransform:
        """Build the transform."""
        import torch

        def transform(
            noise: Tensor, latents: Tensor, timesteps: Tensor, generator: Generator
        ) -> Tensor:
            device = noise.device
            extra = self.ip_noise_gamma * torch.randn(
                noise.shape, generator=generator, device=device
            )
            if self.ip_noise_gamma_random_strength:
                extra = extra * torch.rand((), generator=generator, device=device)
            return noise + extra

        return transform
