"""A distribution of timesteps that prefers one end."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from sdxl_train import Field, Timesteps, UserError

if TYPE_CHECKING:
    from sdxl_train import NoiseSchedule, TimestepSampler
    from torch import Generator, LongTensor


class ExampleTimesteps(Timesteps):
    """Timesteps at ``u ** power`` of their range, for a uniform ``u``."""

    example_power: float = Field(
        2.0, gt=0, description="Above 1: more of the early, less noisy timesteps."
    )

    def build(self, schedule: NoiseSchedule) -> TimestepSampler:
        """Build the sampler.

        Raises:
            UserError: If the range leaves the schedule.
        """
        import torch

        low, high = self.min_timestep, self.max_timestep or schedule.num_timesteps
        if not low < high <= schedule.num_timesteps:
            raise UserError.of(
                "--min_timestep, --max_timestep",
                f"{low} to {high} is not within 0 to {schedule.num_timesteps}",
            )

        def sample(n: int, generator: Generator) -> LongTensor:
            share = torch.rand(n, generator=generator) ** self.example_power
            return cast("LongTensor", low + (share * (high - low)).long().clamp(max=high - low - 1))

        return sample
