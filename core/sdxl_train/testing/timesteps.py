"""The contract of timestep distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdxl_train.components import Timesteps
from sdxl_train.testing.contract import is_refused
from sdxl_train.testing.functions import FunctionContract

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from sdxl_train.schedule import NoiseSchedule

_DRAWS = 4000
_KOLMOGOROV = 1.95
"""Critical value of the Kolmogorov-Smirnov statistic times sqrt(n), for one false alarm in 1000."""


class TimestepsContract(FunctionContract[Timesteps]):
    """A sampler of timesteps: int64 [n] on the CPU, within the range that was asked for."""

    def probabilities(self, schedule: NoiseSchedule) -> Tensor | None:
        """Give the probability of each timestep [T] that the formula states, to be compared."""
        return None

    def inputs(self, schedule: NoiseSchedule, device: str) -> tuple[Any, ...]:
        """Ask for several timesteps."""
        return (64,)

    def apply(
        self, schedule: NoiseSchedule, inputs: tuple[Any, ...], generator: Generator
    ) -> Tensor:
        """Draw timesteps."""
        return self.draw(schedule, *inputs, generator=generator)

    def draw(
        self,
        schedule: NoiseSchedule,
        n: int,
        *,
        generator: Generator | None = None,
        **changes: Any,
    ) -> Tensor:
        """Draw ``n`` timesteps with these options changed."""
        generator = generator or torch.Generator().manual_seed(0)
        return self.make(**changes).build(schedule)(n, generator)

    def test_timesteps_are_integers_on_the_cpu(self) -> None:
        """However many are asked for, they are int64 [n]."""
        for schedule in self.schedules():
            for n in (1, 4):
                drawn = self.draw(schedule, n)
                assert drawn.shape == (n,)
                assert drawn.dtype == torch.int64
                assert drawn.device.type == "cpu"

    def test_range_is_honoured(self) -> None:
        """``min_timestep`` is the lowest timestep, ``max_timestep`` is above the highest."""
        for schedule in self.schedules():
            for low, high in ((0, schedule.num_timesteps), (300, 310), (999, 1000), (0, 1)):
                drawn = self.draw(schedule, _DRAWS, min_timestep=low, max_timestep=high)
                assert low <= drawn.min().item(), f"below min_timestep {low}"
                assert drawn.max().item() < high, f"not below max_timestep {high}"

    def test_range_outside_of_the_schedule_is_refused(self) -> None:
        """Timesteps that the model does not have, and an empty range, are the user's mistake."""
        for schedule in self.schedules():
            beyond = self.make(min_timestep=0, max_timestep=schedule.num_timesteps + 1)
            assert is_refused(beyond.build, schedule), "max_timestep beyond the schedule passes"
            empty = self.make(min_timestep=500, max_timestep=500)
            assert is_refused(empty.build, schedule), "an empty range passes"

    def test_draws_vary(self) -> None:
        """Timesteps differ from one another and from one call to the next."""
        for schedule in self.schedules():
            generator = torch.Generator().manual_seed(0)
            sampler = self.make(min_timestep=0, max_timestep=None).build(schedule)
            first, second = sampler(_DRAWS, generator), sampler(_DRAWS, generator)
            assert len(set(first.tolist())) >= 10, "there are hardly different timesteps"
            assert not torch.equal(first, second), "every call draws the same"

    def test_draws_follow_the_stated_distribution(self) -> None:
        """Kolmogorov-Smirnov against :meth:`probabilities`, where that is stated."""
        for schedule in self.schedules():
            expected = self.probabilities(schedule)
            if expected is None:
                pytest.skip("the contract states no probabilities")
            drawn = self.draw(schedule, _DRAWS)
            counts = torch.bincount(drawn, minlength=schedule.num_timesteps)
            distance = (counts.cumsum(0) / _DRAWS - expected.cumsum(0)).abs().max().item()
            assert distance < _KOLMOGOROV / _DRAWS**0.5, (
                f"the distribution is {distance:.3f} off (Kolmogorov-Smirnov)"
            )
