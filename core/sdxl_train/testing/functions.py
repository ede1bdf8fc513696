"""What the contracts of noises, timesteps, losses and weightings share: they build functions."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch

from sdxl_train.schedule import NoiseSchedule, PredictionType
from sdxl_train.testing.contract import ComponentT, Contract, is_refused, untouched_process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Generator, Tensor

BATCH, CHANNELS, HEIGHT, WIDTH = 3, 4, 8, 6


class FunctionContract(Contract[ComponentT]):
    """A component whose ``build(schedule)`` gives a function."""

    prediction_types: ClassVar[tuple[PredictionType, ...]] = get_args(PredictionType)
    """The models that it is for; others must be refused with a ``UserError``."""

    @abstractmethod
    def inputs(self, schedule: NoiseSchedule, device: str) -> tuple[Any, ...]:
        """Give the arguments of the function, but for the generator."""

    def call(self, schedule: NoiseSchedule, *, seed: int = 0, device: str = "cpu") -> Tensor:
        """Build the function and call it on its usual inputs."""
        inputs = self.inputs(schedule.to(device), device)
        return self.apply(schedule.to(device), inputs, torch.Generator(device).manual_seed(seed))

    def apply(
        self, schedule: NoiseSchedule, inputs: tuple[Any, ...], generator: Generator
    ) -> Tensor:
        """Call the function on these inputs."""
        component: Any = self.make()
        result: Tensor = component.build(schedule)(*inputs)
        return result

    def schedules(self) -> Iterator[NoiseSchedule]:
        """Give a noise schedule for each kind of model that the component is for."""
        for prediction_type in self.prediction_types:
            yield NoiseSchedule.scaled_linear(prediction_type=prediction_type)

    def test_other_models_are_refused(self) -> None:
        """A model that it cannot serve is refused as the user's mistake, when it is built."""
        component: Any = self.make()
        for prediction_type in get_args(PredictionType):
            schedule = NoiseSchedule.scaled_linear(prediction_type=prediction_type)
            expected = prediction_type not in self.prediction_types
            assert is_refused(component.build, schedule) == expected, (
                f"models that predict {prediction_type} must {'' if expected else 'not '}be "
                f"refused: prediction_types is {self.prediction_types}"
            )

    def test_same_draws_give_the_same_result(self) -> None:
        """All its randomness is in the generator, and it remembers nothing."""
        for schedule in self.schedules():
            assert torch.equal(self.call(schedule), self.call(schedule))

    def test_process_is_left_alone(self) -> None:
        """Global generators, default dtype, threads and the like stay as they are."""
        for schedule in self.schedules():
            with untouched_process():
                self.call(schedule)


class TensorFunctionContract(FunctionContract[ComponentT]):
    """A function of tensors that lie on the training device."""

    def test_inputs_are_left_alone(self) -> None:
        """Others go on with the tensors that it is given."""
        for schedule in self.schedules():
            inputs = self.inputs(schedule, "cpu")
            copies = [tensor.clone() for tensor in inputs]
            self.apply(schedule, inputs, torch.Generator().manual_seed(0))
            assert all(torch.equal(*pair) for pair in zip(inputs, copies, strict=True)), (
                "it changes a tensor that it was given"
            )

    def test_result_is_on_the_device_of_the_inputs(self) -> None:
        """Every tensor that it makes is put where the inputs are."""
        for schedule in self.schedules():
            for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
                assert self.call(schedule, device=device).device.type == device
            expected = self.call(schedule)
            # What is made without a device lands elsewhere here, as it would on a GPU.
            with torch.device("meta"):
                result = self.call(schedule)
            assert result.device.type == "cpu", "it makes a tensor without device=..."
            assert torch.equal(result, expected)


def normal(*shape: int, device: str = "cpu", seed: int = 1) -> Tensor:
    """Draw from N(0, 1)."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device)


def spread_timesteps(n: int, schedule: NoiseSchedule) -> Tensor:
    """Give timesteps [n] from the first to the last one."""
    last = schedule.num_timesteps - 1
    return torch.linspace(0, last, n, device=schedule.alphas_cumprod.device).round().long()
