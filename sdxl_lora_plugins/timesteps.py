"""Distributions of training timesteps.

All but the uniform one are tables: a weight for each timestep of the schedule, drawn in proportion.
``--min_timestep`` and ``--max_timestep`` cut the table, and what is left keeps its proportions.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING, Annotated, ClassVar, cast

from sdxl_train import Field, Problem, Timesteps, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Generator, LongTensor, Tensor

    from sdxl_train import NoiseSchedule, RunConfig, TimestepSampler


class _Ranged(Timesteps):
    """Timesteps from ``min_timestep`` up to, not including, ``max_timestep``."""

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse an empty range."""
        if self.max_timestep is not None and self.min_timestep >= self.max_timestep:
            yield Problem(
                place=config.place("min_timestep"),
                message=f"{self.min_timestep} is not below "
                f"{config.place('max_timestep')} {self.max_timestep}",
                remedy="timesteps are trained from the first up to, not including, the second",
            )

    def bounds(self, schedule: NoiseSchedule) -> tuple[int, int]:
        """Give the lowest timestep and the one after the highest.

        Raises:
            UserError: If the range leaves the schedule.
        """
        high = schedule.num_timesteps if self.max_timestep is None else self.max_timestep
        if high > schedule.num_timesteps or self.min_timestep >= high:
            raise UserError.of(
                "--min_timestep, --max_timestep",
                f"{self.min_timestep} to {high} is not within 0 to {schedule.num_timesteps}",
            )
        return self.min_timestep, high


class Uniform(_Ranged):
    """Every timestep is equally likely."""

    default: ClassVar[bool] = True

    def build(self, schedule: NoiseSchedule) -> TimestepSampler:
        """Build ``U{min, ..., max - 1}``.

        Raises:
            UserError: If the range leaves the schedule.
        """
        import torch

        low, high = self.bounds(schedule)

        def sample(n: int, generator: Generator) -> LongTensor:
            drawn = torch.randint(low, high, (n,), generator=generator)
            return cast("LongTensor", drawn)

        return sample


class _Weighted(_Ranged):
    """Timesteps that are drawn in proportion to a table."""

    @abstractmethod
    def weights(self, schedule: NoiseSchedule) -> Tensor:
        """Give the weight of each timestep of the schedule: float64 [T] on the CPU, at least 0."""

    def build(self, schedule: NoiseSchedule) -> TimestepSampler:
        """Build draws in proportion to :meth:`weights`, within the range.

        Raises:
            UserError: If the range leaves the schedule, or no timestep in it has a weight.
        """
        import torch

        low, high = self.bounds(schedule)
        weights = self.weights(schedule.to("cpu"))[low:high]
        if not weights.any():
            raise UserError.of(
                "--min_timestep, --max_timestep",
                f"none of the timesteps {low} to {high - 1} has any weight",
                "widen the range",
            )

        def sample(n: int, generator: Generator) -> LongTensor:
            drawn = torch.multinomial(weights, n, replacement=True, generator=generator)
            return cast("LongTensor", low + drawn)

        return sample


class LogitNormal(_Weighted):
    """Mostly timesteps in the middle: ``t / T = sigmoid(z)`` with ``z ~ N(mean, std^2)``.

    Esser et al. 2024 ("Scaling Rectified Flow Transformers"), equation 19. The weight of timestep
    ``t`` is the probability between ``t / T`` and ``(t + 1) / T``.
    """

    logit_mean: float = Field(
        0.0, description="Mean before the sigmoid: above 0 for more noisy timesteps."
    )
    logit_std: float = Field(
        1.0, gt=0, description="Deviation before the sigmoid: the smaller, the nearer the mean."
    )

    def weights(self, schedule: NoiseSchedule) -> Tensor:
        """Give the differences of the distribution function."""
        import torch

        edges = torch.linspace(0, 1, schedule.num_timesteps + 1, dtype=torch.float64)
        below: Tensor = torch.special.ndtr((torch.logit(edges) - self.logit_mean) / self.logit_std)
        return below.diff()


class Cosine(_Weighted):
    """Each level of noise as often as on a cosine schedule: on SDXL's, more of the clean ones.

    There, ``abar = cos(pi u / 2)^2`` with even steps of ``u`` (Nichol & Dhariwal 2021, equation 17,
    without its offset). So a timestep weighs as much as the angle ``acos(sqrt(abar))`` moves at it:
    half the difference of its neighbours', at both ends the whole one to the next.
    """

    def weights(self, schedule: NoiseSchedule) -> Tensor:
        """Give how the angle moves."""
        import torch

        angle = schedule.alphas_cumprod.double().sqrt().acos()
        return torch.gradient(angle)[0]


class Sigmoid(_Weighted):
    """Mostly noisy timesteps: the weight of a timestep is ``sigmoid(bias - log SNR_t)``.

    The sigmoid weighting of Kingma & Gao 2023 ("Understanding Diffusion Objectives as the ELBO with
    Simple Data Augmentation", section 5), drawn instead of multiplied. Nearly every timestep
    whose log SNR is below the bias counts fully, nearly none above it.
    """

    sigmoid_bias: float = Field(
        0.0, description="Log SNR at which a timestep counts half: lower for only the noisiest."
    )

    def weights(self, schedule: NoiseSchedule) -> Tensor:
        """Give the sigmoids."""
        abar = schedule.alphas_cumprod.double()
        log_snr = abar.log() - (1.0 - abar).log()
        return (self.sigmoid_bias - log_snr).sigmoid()


class Table(_Weighted):
    """Timesteps in proportion to given weights, spread evenly over the schedule.

    Of N weights, the i-th is that of every timestep from ``i T / N`` up to ``(i + 1) T / N``: ten
    weights are those of the tenths, a thousand those of SDXL's timesteps one by one.
    """

    timestep_weights: list[Annotated[float, Field(ge=0)]] | None = Field(
        None, min_length=1, description="Weights from the cleanest to the noisiest timesteps."
    )
    timestep_weights_file: Path | None = Field(
        None,
        description="File with the weights: numbers between spaces, commas or lines, or a JSON "
        "list.",
    )

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse no table, two tables, and numbers that are no weights."""
        yield from super().check(config)
        inline, file = self.timestep_weights, self.timestep_weights_file
        if inline is None and config.is_set("timestep_weights"):
            return  # it was given and is no table, which is a problem of its own
        if (inline is None) == (file is None):
            yield Problem(
                place=", ".join(map(config.place, ("timestep_weights", "timestep_weights_file"))),
                message="are both given" if inline else "are both missing: there is no table",
                remedy="give one of them",
            )
            return
        place = config.place("timestep_weights_file" if file else "timestep_weights")
        try:
            table = self._table()
        except (OSError, ValueError) as error:
            yield Problem(place=place, message=f"cannot be read: {error}")
            return
        wrong = [number for number in table if not (math.isfinite(number) and number >= 0)]
        if wrong:
            yield Problem(place=place, message=f"{wrong[0]} is no weight", remedy="give 0 or more")
        elif not any(table):
            yield Problem(place=place, message="has no weight above 0: no timestep could be drawn")

    def weights(self, schedule: NoiseSchedule) -> Tensor:
        """Spread the table over the schedule.

        Raises:
            UserError: If it is longer than the schedule.
        """
        import torch

        table, count = torch.tensor(self._table(), dtype=torch.float64), schedule.num_timesteps
        if len(table) > count:
            place = "timestep_weights" if self.timestep_weights else "timestep_weights_file"
            raise UserError.of(f"--{place}", f"{len(table)} weights for {count} timesteps")
        return table[torch.arange(count) * len(table) // count]

    def _table(self) -> list[float]:
        """Give the numbers of the table.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it holds anything but numbers, or none.
        """
        if self.timestep_weights is not None:
            return self.timestep_weights
        assert self.timestep_weights_file is not None
        text = self.timestep_weights_file.read_text(encoding="utf-8-sig")
        is_json = text.lstrip().startswith("[")
        words = json.loads(text) if is_json else text.replace(",", " ").split()
        if not words:
            raise ValueError("it holds no numbers")
        return [float(str(word)) for word in words]
