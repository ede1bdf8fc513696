"""What components give in each step, held to their contracts.

A wrong shape would often be broadcast and train something else, or fail far from its cause.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdxl_train.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, LongTensor, Tensor

    from sdxl_train.protocols import LossFunction, NoiseTransform, TimestepSampler, WeightFunction


def checked_timesteps(name: str, draw: TimestepSampler, num_timesteps: int) -> TimestepSampler:
    """Hold a distribution of timesteps to int64 [n] in [0, num_timesteps).

    The functions that this module gives raise TrainingError, which names the component.
    """

    def checked(n: int, generator: Generator) -> LongTensor:
        timesteps = draw(n, generator)
        _require(timesteps, name, "timesteps", (n,), integer=True)
        low, high = int(timesteps.min()), int(timesteps.max())
        if low < 0 or high >= num_timesteps:
            raise TrainingError(
                f"{name} gave timesteps from {low} to {high}, expected 0 to {num_timesteps - 1}"
            )
        return timesteps

    return checked


def checked_noise(name: str, transform: NoiseTransform) -> NoiseTransform:
    """Hold a noise to the shape of the noise that it was given."""

    def checked(noise: Tensor, latents: Tensor, timesteps: Tensor, generator: Generator) -> Tensor:
        given = transform(noise, latents, timesteps, generator)
        _require(given, name, "noise", noise.shape)
        return given

    return checked


def checked_loss(name: str, loss: LossFunction) -> LossFunction:
    """Hold a loss to one number for each element of the prediction."""

    def checked(prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        given = loss(prediction, target, timesteps)
        _require(given, name, "a loss", prediction.shape)
        return given

    return checked


def checked_weights(name: str, weigh: WeightFunction) -> WeightFunction:
    """Hold a weighting to one number for each timestep."""

    def checked(timesteps: Tensor) -> Tensor:
        given = weigh(timesteps)
        _require(given, name, "weights", timesteps.shape)
        return given

    return checked


def _require(
    given: object, name: str, what: str, shape: Sequence[int], *, integer: bool = False
) -> None:
    if not isinstance(given, torch.Tensor):
        raise TrainingError(f"{name} gave a {type(given).__name__}, expected a tensor of {what}")
    fits = given.dtype == torch.int64 if integer else given.is_floating_point()
    if tuple(given.shape) != tuple(shape) or not fits:
        wanted = "int64" if integer else "floating-point numbers"
        raise TrainingError(
            f"{name} gave {what} of shape {list(given.shape)} in {given.dtype}, expected "
            f"{list(shape)} of {wanted}"
        )
