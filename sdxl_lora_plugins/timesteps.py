"""Distributions of training timesteps."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from sdxl_train import Problem, Timesteps, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Generator, LongTensor

    from sdxl_train import NoiseSchedule, RunConfig, TimestepSampler


class Uniform(Timesteps):
    """Every timestep is equally likely."""

    default: ClassVar[bool] = True

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse an empty range."""
        if self.max_timestep is not None and self.min_timestep >= self.max_timestep:
            yield Problem(
                place=config.place("min_timestep"),
                message=f"{self.min_timestep} is not below --max_timestep {self.max_timestep}",
                remedy="timesteps are trained from the first up to, not including, the second",
            )

    def build(self, schedule: NoiseSchedule) -> TimestepSampler:
        """Build ``U{min, ..., max - 1}``.

        Raises:
            UserError: If the range leaves the schedule.
        """
        import torch

        high = schedule.num_timesteps if self.max_timestep is None else self.max_timestep
        if high > schedule.num_timesteps or self.min_timestep >= high:
            raise UserError.of(
                "--min_timestep, --max_timestep",
                f"{self.min_timestep} to {high} is not within 0 to {schedule.num_timesteps}",
            )

        def sample(n: int, generator: Generator) -> LongTensor:
            drawn = torch.randint(self.min_timestep, high, (n,), generator=generator)
            return cast("LongTensor", drawn)

        return sample
