"""The contract of noises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from sdxl_train.components import Noise
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
    from torch import Generator, Tensor

    from sdxl_train.schedule import NoiseSchedule

_SAMPLES, _SIDE = 64, 16


class NoiseContract(TensorFunctionContract[Noise]):
    """A transform of noise: of its shape and type, with mean 0, drawn from the generator."""

    std: ClassVar[tuple[float, float]] = (0.5, 2.0)
    """Lowest and highest standard deviation of what it makes of standard normal noise."""

    def inputs(self, schedule: NoiseSchedule, device: str) -> tuple[Tensor, ...]:
        """Give noise, latents and timesteps of a small batch."""
        return (
            normal(BATCH, CHANNELS, HEIGHT, WIDTH, device=device),
            normal(BATCH, CHANNELS, HEIGHT, WIDTH, device=device, seed=2),
            spread_timesteps(BATCH, schedule),
        )

    def apply(
        self, schedule: NoiseSchedule, inputs: tuple[Any, ...], generator: Generator
    ) -> Tensor:
        """Transform this noise."""
        noise, latents, timesteps = inputs
        return self.make().build(schedule)(noise, latents, timesteps, generator)

    def test_phase_is_one_that_the_loop_knows(self) -> None:
        """The phase says whether the noise is predicted too."""
        assert self.component.phase in ("target", "input")

    def test_shape_and_dtype_stay(self) -> None:
        """Noise [B, C, h, w] fp32 stays that, also in a batch of one."""
        for schedule in self.schedules():
            for batch in (1, BATCH):
                inputs = tuple(tensor[:batch] for tensor in self.inputs(schedule, "cpu"))
                result = self.apply(schedule, inputs, torch.Generator().manual_seed(0))
                assert result.shape == inputs[0].shape
                assert result.dtype == torch.float32
                assert torch.isfinite(result).all()

    def test_noise_stays_centred_and_of_its_size(self) -> None:
        """The mean is 0 within five standard errors; the deviation is within ``std``."""
        shape = (_SAMPLES, CHANNELS, _SIDE, _SIDE)
        for schedule in self.schedules():
            inputs = (normal(*shape), normal(*shape, seed=2), spread_timesteps(_SAMPLES, schedule))
            result = self.apply(schedule, inputs, torch.Generator().manual_seed(0))
            means = result.mean(dim=(1, 2, 3))  # [B]
            error = means.std().item() / _SAMPLES**0.5
            assert abs(means.mean().item()) < 5 * error + 1e-3, "its mean is not 0"
            low, high = self.std
            assert low <= result.std().item() <= high, (
                f"the standard deviation is {result.std().item():.3f}, not within {self.std}"
            )
