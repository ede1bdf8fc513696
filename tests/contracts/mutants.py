"""Broken components, one for each check of the kit, under the contract that must catch them.

Run by ``test_mutants.py``; pytest does not collect this file by itself.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from pydantic import ConfigDict
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from sdxl_lora_plugins.fp8 import Fp8Format, Fp8MatmulFormat
from sdxl_lora_plugins.model import Sdxl
from sdxl_lora_plugins.networks import Lokr, Lora
from sdxl_train import (
    Command,
    Field,
    Loss,
    Noise,
    Observer,
    Optimizer,
    ParameterGroup,
    Quantization,
    Scheduler,
    Timesteps,
    UserError,
    Weighting,
)
from sdxl_train.testing import (
    CommandContract,
    LossContract,
    ModelContract,
    NetworkContract,
    NoiseContract,
    ObserverContract,
    OptimizerContract,
    QuantizationContract,
    SchedulerContract,
    TimestepsContract,
    WeightingContract,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sdxl_train import NoiseSchedule, StepPlan
    from sdxl_train.testing.fixtures import TinyModel

CAUGHT_BY: dict[str, str] = {}
"""The check that must fail, by the name of the contract's class here."""


def caught_by(check: str) -> Callable[[type], type]:
    """Note which check must fail for this contract's component."""

    def note(contract: type) -> type:
        CAUGHT_BY[contract.__name__] = check
        return contract

    return note


# ----------------------------------------------------------------- noises, and what all kinds share


def noise_of(transform: Callable[..., Any], **members: Any) -> type[Noise]:
    """Make a noise of a function ``(noise, generator) -> noise``."""

    class Mutant(Noise):
        """A noise."""

        def build(self, schedule: NoiseSchedule) -> Any:
            return lambda noise, latents, timesteps, generator: transform(noise, generator)

    for name, value in members.items():
        setattr(Mutant, name, value)
    return Mutant


def same(noise: Any, generator: Any) -> Any:
    return noise


class Incomplete(Noise):
    """A noise without ``build``."""


class Undocumented(Noise):
    def build(self, schedule: NoiseSchedule) -> Any:
        return lambda noise, *_: noise


class Forgotten(Noise):
    """A noise whose option is in no record."""

    strength: float = Field(1.0, exclude=True, description="Strength.")

    def build(self, schedule: NoiseSchedule) -> Any:
        return lambda noise, *_: noise


class Careless(Noise):
    """A noise that takes any option."""

    model_config = ConfigDict(extra="allow")

    def build(self, schedule: NoiseSchedule) -> Any:
        return lambda noise, *_: noise


class Loose(Noise):
    """A noise whose options can be set later."""

    model_config = ConfigDict(frozen=False)
    strength: float = Field(1.0, description="Strength.")

    def build(self, schedule: NoiseSchedule) -> Any:
        return lambda noise, *_: noise


class Picky(Noise):
    """A noise for models that predict noise, which does not say so."""

    def build(self, schedule: NoiseSchedule) -> Any:
        if schedule.prediction_type != "epsilon":
            raise UserError.of("noise", "is not for this model")
        return lambda noise, *_: noise


class Remembering(Noise):
    """A noise that depends on the calls before."""

    calls: ClassVar[list[int]] = []

    def build(self, schedule: NoiseSchedule) -> Any:
        def transform(noise: Any, *_: Any) -> Any:
            self.calls.append(1)
            return noise * len(self.calls)

        return transform


@caught_by("test_host_accepts_the_class")
class TestIncomplete(NoiseContract):
    component = Incomplete


@caught_by("test_class_and_options_are_documented")
class TestUndocumented(NoiseContract):
    component = Undocumented


@caught_by("test_options_survive_the_record")
class TestForgotten(NoiseContract):
    component = Forgotten
    options = {"strength": 2.0}


@caught_by("test_unknown_option_is_refused")
class TestCareless(NoiseContract):
    component = Careless


@caught_by("test_options_are_frozen")
class TestLoose(NoiseContract):
    component = Loose


@caught_by("test_other_models_are_refused")
class TestPicky(NoiseContract):
    component = Picky


@caught_by("test_same_draws_give_the_same_result")
class TestRemembering(NoiseContract):
    component = Remembering


@caught_by("test_process_is_left_alone")
class TestGlobalNoise(NoiseContract):
    component = noise_of(lambda noise, generator: torch.randn(noise.shape))


@caught_by("test_inputs_are_left_alone")
class TestInPlace(NoiseContract):
    component = noise_of(lambda noise, generator: noise.mul_(1.1))


@caught_by("test_result_is_on_the_device_of_the_inputs")
class TestElsewhere(NoiseContract):
    component = noise_of(lambda noise, generator: torch.zeros(noise.shape))


@caught_by("test_phase_is_one_that_the_loop_knows")
class TestPhase(NoiseContract):
    component = noise_of(same, phase="output")


@caught_by("test_shape_and_dtype_stay")
class TestDouble(NoiseContract):
    component = noise_of(lambda noise, generator: noise.double())


@caught_by("test_noise_stays_centred_and_of_its_size")
class TestShifted(NoiseContract):
    component = noise_of(lambda noise, generator: noise + 1)


# ------------------------------------------------------------------ timesteps, losses, weightings


def timesteps_of(sample: Callable[..., Any]) -> type[Timesteps]:
    """Make a distribution of a function ``(n, generator, low, high) -> timesteps``."""

    class Mutant(Timesteps):
        """A distribution."""

        def build(self, schedule: NoiseSchedule) -> Any:
            low, high = self.min_timestep, self.max_timestep or schedule.num_timesteps
            if not low < high <= schedule.num_timesteps:
                raise UserError.of("timesteps", "the range leaves the schedule")
            return lambda n, generator: sample(n, generator, low, high)

    return Mutant


def uniform(n: int, generator: Any, low: int, high: int) -> Any:
    return torch.randint(low, high, (n,), generator=generator)


class Boundless(Timesteps):
    """A distribution that takes any range."""

    def build(self, schedule: NoiseSchedule) -> Any:
        low, high = self.min_timestep, self.max_timestep or schedule.num_timesteps
        return lambda n, generator: uniform(n, generator, low, max(high, low + 1))


@caught_by("test_timesteps_are_integers_on_the_cpu")
class TestFractions(TimestepsContract):
    component = timesteps_of(lambda *given: uniform(*given).float())


@caught_by("test_range_is_honoured")
class TestWholeRange(TimestepsContract):
    component = timesteps_of(lambda n, generator, low, high: uniform(n, generator, 0, 1000))


@caught_by("test_range_outside_of_the_schedule_is_refused")
class TestBoundless(TimestepsContract):
    component = Boundless


@caught_by("test_draws_vary")
class TestConstantTimesteps(TimestepsContract):
    component = timesteps_of(lambda n, generator, low, high: torch.full((n,), low))


@caught_by("test_draws_follow_the_stated_distribution")
class TestSkewed(TimestepsContract):
    component = timesteps_of(lambda *given: uniform(*given) // 2)

    def probabilities(self, schedule: NoiseSchedule) -> Any:
        return torch.full((schedule.num_timesteps,), 1 / schedule.num_timesteps)


def loss_of(function: Callable[[Any, Any], Any]) -> type[Loss]:
    """Make a loss of a function ``(prediction, target) -> loss``."""

    class Mutant(Loss):
        """A loss."""

        def build(self, schedule: NoiseSchedule) -> Any:
            return lambda prediction, target, timesteps: function(prediction, target)

    return Mutant


@caught_by("test_loss_is_by_element_and_positive")
class TestMeanLoss(LossContract):
    component = loss_of(lambda p, t: (p - t).square().mean())


@caught_by("test_loss_is_zero_at_equality")
class TestRaisedLoss(LossContract):
    component = loss_of(lambda p, t: (p - t).square() + 1)


@caught_by("test_large_errors_stay_finite")
class TestExponentialLoss(LossContract):
    component = loss_of(lambda p, t: (p - t).abs().exp() - 1)


@caught_by("test_gradient_is_that_of_the_loss")
class TestWrongGradient(LossContract):
    component = loss_of(lambda p, t: (p - t).square().detach() + p - p.detach())


def weighting_of(weight: Callable[[Any], Any]) -> type[Weighting]:
    """Make a weighting of a function ``timesteps -> weights``."""

    class Mutant(Weighting):
        """A weighting."""

        def build(self, schedule: NoiseSchedule) -> Any:
            return weight

    return Mutant


@caught_by("test_weights_are_positive_and_finite_everywhere")
class TestZeroWeight(WeightingContract):
    component = weighting_of(lambda timesteps: (timesteps > 0).float())


@caught_by("test_weight_depends_on_the_timestep_alone")
class TestNormalizedWeight(WeightingContract):
    component = weighting_of(lambda timesteps: (timesteps + 1.0) / (timesteps + 1.0).mean())


# -------------------------------------------------------------------------------------- optimizers


def optimizer_of(make: Callable[[list[Any]], Any], **members: Any) -> type[Optimizer]:
    """Make an optimizer component of a function ``groups -> optimizer``."""

    class Mutant(Optimizer):
        """An optimizer."""

        def build(self, groups: Sequence[dict[str, Any]]) -> Any:
            return make(list(groups))

    for name, value in members.items():
        setattr(Mutant, name, value)
    return Mutant


class Stubborn(SGD):
    """Keeps the rates that it began with."""

    def __init__(self, groups: list[Any]) -> None:
        super().__init__(groups)
        self.rates = [group["lr"] for group in self.param_groups]

    def step(self, closure: Any = None) -> Any:
        written = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, self.rates, strict=True):
            group["lr"] = rate
        super().step()
        for group, rate in zip(self.param_groups, written, strict=True):
            group["lr"] = rate


class OneRate(SGD):
    """Gives every group the rate 0.1."""

    def step(self, closure: Any = None) -> Any:
        written = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = 0.1
        super().step()
        for group, rate in zip(self.param_groups, written, strict=True):
            group["lr"] = rate


class Secretive(SGD):
    """Keeps a number of steps where no state has it."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= self.steps
        super().step()


class Restless(SGD):
    """Decays parameters that have no gradient too."""

    def step(self, closure: Any = None) -> Any:
        super().step()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.9)


class Noisy(SGD):
    """Adds noise from the global generator."""

    def step(self, closure: Any = None) -> Any:
        super().step()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3)


class Normalizing(SGD):
    """Divides each gradient by its norm."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= parameter.grad.norm()
        super().step()


class Modal(SGD):
    """Has modes."""

    def train(self) -> None:
        """Do nothing."""

    def eval(self) -> None:
        """Do nothing."""


@caught_by("test_it_converges_on_a_quadratic")
class TestAscent(OptimizerContract):
    component = optimizer_of(lambda groups: SGD(groups, maximize=True))


@caught_by("test_groups_stay_as_they_are_given")
class TestReordered(OptimizerContract):
    component = optimizer_of(lambda groups: SGD(groups[::-1]))


@caught_by("test_group_rates_are_honoured")
class TestOneRate(OptimizerContract):
    component = optimizer_of(OneRate)


@caught_by("test_rates_can_change_at_every_step")
class TestStubborn(OptimizerContract):
    component = optimizer_of(Stubborn)


@caught_by("test_state_goes_through_files_bit_for_bit")
class TestSecretive(OptimizerContract):
    component = optimizer_of(Secretive)


@caught_by("test_parameters_without_gradient_stay")
class TestRestless(OptimizerContract):
    component = optimizer_of(Restless)


@caught_by("test_same_start_gives_the_same_steps")
class TestNoisy(OptimizerContract):
    component = optimizer_of(Noisy)


@caught_by("test_process_is_left_alone")
class TestNoisyProcess(OptimizerContract):
    component = optimizer_of(Noisy)


@caught_by("test_modes_are_as_declared")
class TestModal(OptimizerContract):
    component = optimizer_of(Modal)


@caught_by("test_fused_backward_is_true_if_declared")
class TestNotFused(OptimizerContract):
    component = optimizer_of(Secretive, fused_backward=True)


@caught_by("test_elementwise_is_true_if_declared")
class TestNotElementwise(OptimizerContract):
    component = optimizer_of(Normalizing, elementwise=True)


# ------------------------------------------------------------------------------------ quantizations


def quantization_of(form: type[Fp8Format]) -> type[Quantization]:
    """Make a quantization of a format."""

    class Mutant(Quantization):
        """A format."""

        def build(self) -> Any:
            return form()

    return Mutant


class Enlarging(Fp8Format):
    """Gives values that are too large."""

    def unpack(self, packed: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return 1.5 * super().unpack(packed, shape, dtype)


class Wasteful(Fp8Format):
    """Keeps the weight beside."""

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (*super().pack(weight), weight.float())

    def unpack(self, packed: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return super().unpack(packed[:2], shape, dtype)


class Dividing(Fp8Format):
    """Divides by the largest value, whatever that is."""

    def unpack(self, packed: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        values = super().unpack(packed, shape, dtype)
        return values / values.abs().max() * values.abs().max()


class Unplanned(Fp8Format):
    """Stores something else on the meta device."""

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        stored, scale = super().pack(weight)
        return (stored.to(torch.int16) if weight.is_meta else stored), scale


class Miscalculating(Fp8MatmulFormat):
    """Multiplies with something else than it stores."""

    def product(self, rows: Tensor, packed: Sequence[Tensor]) -> Tensor:
        return -super().product(rows, packed)


class Drawing(Fp8Format):
    """Draws from the global generator."""

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        return super().pack(weight + 0 * torch.rand(()).to(weight))


@caught_by("test_weights_come_back_nearly_as_they_were")
class TestEnlarging(QuantizationContract):
    component = quantization_of(Enlarging)


@caught_by("test_less_is_stored_than_in_16_bits")
class TestWasteful(QuantizationContract):
    component = quantization_of(Wasteful)


@caught_by("test_weights_of_zeros_come_back_as_zeros")
class TestDividing(QuantizationContract):
    component = quantization_of(Dividing)


@caught_by("test_a_plan_knows_what_is_stored")
class TestUnplanned(QuantizationContract):
    component = quantization_of(Unplanned)


@caught_by("test_layers_compute_with_what_they_store")
class TestMiscalculating(QuantizationContract):
    component = quantization_of(Miscalculating)


@caught_by("test_process_is_left_alone")
class TestDrawingFormat(QuantizationContract):
    component = quantization_of(Drawing)


# -------------------------------------------------------------------------------------- schedulers


def scheduler_of(factor: Callable[[int, Any], float]) -> type[Scheduler]:
    """Make a scheduler of a function ``(step, plan) -> factor``."""

    class Mutant(Scheduler):
        """A schedule."""

        def build(self, optimizer: Any, steps: StepPlan) -> Any:
            return LambdaLR(optimizer, lambda step: factor(step, steps))

    return Mutant


def constant(step: int, plan: Any) -> float:
    return 1.0


class TwoCurves(Scheduler):
    """Another curve for each group."""

    def build(self, optimizer: Any, steps: StepPlan) -> Any:
        return LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.99**step])


class Counting(Scheduler):
    """A schedule that counts for itself."""

    def build(self, optimizer: Any, steps: StepPlan) -> Any:
        calls = [0]

        def factor(step: int) -> float:
            calls[0] += 1
            return float(0.999 ** calls[0])

        return LambdaLR(optimizer, factor)


def drawn(step: int, plan: Any) -> float:
    return torch.rand(()).item()


@caught_by("test_factors_are_finite_and_within_bounds")
class TestNegative(SchedulerContract):
    component = scheduler_of(lambda step, plan: 1 - 2 * step / plan.total)


@caught_by("test_it_ends_as_declared")
class TestEndless(SchedulerContract):
    component = scheduler_of(constant)
    ends_at = 0.0


@caught_by("test_all_groups_follow_one_curve")
class TestTwoCurves(SchedulerContract):
    component = TwoCurves


@caught_by("test_warmup_acts_or_is_refused")
class TestNoWarmup(SchedulerContract):
    component = scheduler_of(constant)


@caught_by("test_restored_schedule_goes_on_alike")
class TestCounting(SchedulerContract):
    component = Counting


@caught_by("test_process_is_left_alone")
class TestDrawnRates(SchedulerContract):
    component = scheduler_of(drawn)


# --------------------------------------------------------------------------------------- networks


def network_of(tamper: Callable[[Any, Any], None], kind: type[Lora] = Lora) -> type[Lora]:
    """Make a LoRA whose adapter is tampered with: ``tamper(adapter, model)``."""

    class Mutant(kind):  # type: ignore[misc, valid-type]
        """A network."""

        def build(self, model: Any) -> Any:
            adapter = super().build(model)
            tamper(adapter, model)
            return adapter

    return Mutant


def started(adapter: Any, model: Any) -> None:
    with torch.no_grad():
        for group in adapter.groups():
            for parameter in group.parameters:
                parameter.add_(0.1)


def silent(adapter: Any, model: Any) -> None:
    adapter.multiplier = 0.0


def greedy(adapter: Any, model: Any) -> None:
    model.denoiser.conv_in.requires_grad_(True)


def stray_group(adapter: Any, model: Any) -> None:
    groups = [dataclasses.replace(group, part="nowhere") for group in adapter.groups()]
    adapter.groups = lambda: groups


def idle_group(adapter: Any, model: Any) -> None:
    idle = ParameterGroup(
        part=adapter.groups()[0].part, name="idle", parameters=[torch.nn.Parameter(torch.zeros(2))]
    )
    groups = [*adapter.groups(), idle]
    adapter.groups = lambda: groups


def clinging(adapter: Any, model: Any) -> None:
    detach = adapter.detach

    def change_and_detach() -> None:
        detach()
        with torch.no_grad():
            model.denoiser.conv_in.bias.add_(1e-3)

    adapter.detach = change_and_detach


def rounding(adapter: Any, model: Any) -> None:
    load = adapter.load_state_dict
    adapter.load_state_dict = lambda state: load(
        {name: t.bfloat16().float() if t.ndim else t for name, t in state.items()}
    )


def lenient(adapter: Any, model: Any) -> None:
    adapter.load_state_dict = lambda state: None


def renamed(adapter: Any, model: Any) -> None:
    state = adapter.state_dict
    adapter.state_dict = lambda: {f"my_{name}": tensor for name, tensor in state().items()}


def wrong_alpha(adapter: Any, model: Any) -> None:
    state = adapter.state_dict
    adapter.state_dict = lambda: {
        name: tensor * 2 if name.endswith("alpha") else tensor for name, tensor in state().items()
    }


def numbers(adapter: Any, model: Any) -> None:
    adapter.metadata = lambda: {"ss_network_dim": 4}


def no_plan(adapter: Any, model: Any) -> None:
    if model.denoiser.conv_in.weight.is_meta:
        state = adapter.state_dict
        adapter.state_dict = lambda: dict(list(state().items())[3:])


def seedless(adapter: Any, model: Any) -> None:
    generator = torch.Generator()
    generator.seed()
    with torch.no_grad():
        for group in adapter.groups():
            for parameter in group.parameters:
                parameter.add_(1e-6 * torch.randn(parameter.shape, generator=generator))


def drawing(adapter: Any, model: Any) -> None:
    adapter.prepare_step = lambda timesteps: torch.rand(1)


class NoDropout(Lora):
    """A network that forgets its dropout."""

    def build(self, model: Any) -> Any:
        return Lora(**{**self.model_dump(), "network_dropout": None}).build(model)


@caught_by("test_fresh_network_changes_nothing")
class TestStarted(NetworkContract):
    component = network_of(started)


@caught_by("test_trained_network_changes_the_prediction")
class TestSilent(NetworkContract):
    component = network_of(silent)


@caught_by("test_only_its_own_parameters_train")
class TestGreedy(NetworkContract):
    component = network_of(greedy)


@caught_by("test_groups_are_those_of_the_parts")
class TestStrayGroup(NetworkContract):
    component = network_of(stray_group)


@caught_by("test_every_group_gets_a_gradient")
class TestIdleGroup(NetworkContract):
    component = network_of(idle_group)


@caught_by("test_detach_gives_the_model_back")
class TestClinging(NetworkContract):
    component = network_of(clinging)


@caught_by("test_saved_network_loads_exactly")
class TestRounding(NetworkContract):
    component = network_of(rounding)


@caught_by("test_other_files_are_refused")
class TestLenient(NetworkContract):
    component = network_of(lenient)


@caught_by("test_keys_conform")
class TestRenamed(NetworkContract):
    component = network_of(renamed)


@caught_by("test_file_says_what_the_forward_does")
class TestWrongAlpha(NetworkContract):
    component = network_of(wrong_alpha)


@caught_by("test_metadata_is_text")
class TestNumbers(NetworkContract):
    component = network_of(numbers)


@caught_by("test_plan_needs_no_weights")
class TestNoPlan(NetworkContract):
    component = network_of(no_plan)


@caught_by("test_same_seed_gives_the_same_network")
class TestSeedless(NetworkContract):
    component = network_of(seedless)


@caught_by("test_process_is_left_alone")
class TestDrawing(NetworkContract):
    component = network_of(drawing)


@caught_by("test_options_of_all_networks_act_or_are_refused")
class TestNoDropout(NetworkContract):
    component = NoDropout


@caught_by("test_file_loads_in_diffusers_where_claimed")
class TestForeign(NetworkContract):
    component = Lokr
    options = {"factor": 4}
    model_options = {"network_train_unet_only": True}
    loads_in_diffusers = True


# ---------------------------------------------------------------------------- observers, commands


def observer_of(listener: type, steps: Sequence[int] = ()) -> type[Observer]:
    """Make an observer that builds a listener."""

    class Mutant(Observer):
        """An observer."""

        def sample_steps(self, counts: Any) -> Sequence[int]:
            return steps

        def build(self, run: Any) -> object:
            return listener()

    return Mutant


class Deaf:
    """Hears nothing."""


class Failing:
    def checkpoint_saved(self, checkpoint: Any) -> None:
        raise OSError("no space")


class Dependent:
    def run_started(self, run: Any) -> None:
        self.steps = 0

    def step_finished(self, step: Any) -> None:
        self.steps += 1


class Ordered:
    validated = False

    def validation_finished(self, result: Any) -> None:
        self.validated = True

    def step_finished(self, step: Any) -> None:
        if self.validated and step.step == 1:
            raise ValueError("a step before the validation")


class Unforgiving:
    def run_finished(self, error: Any) -> None:
        if error is not None:
            raise error


class Meddling:
    def run_started(self, run: Any) -> None:
        for tensor in run.assembly.adapter.state_dict().values():
            tensor.add_(1)


@caught_by("test_it_hears_events")
class TestDeaf(ObserverContract):
    component = observer_of(Deaf)


@caught_by("test_events_of_a_run_pass")
class TestFailing(ObserverContract):
    component = observer_of(Failing)


@caught_by("test_each_event_passes_alone_and_twice")
class TestDependent(ObserverContract):
    component = observer_of(Dependent)


@caught_by("test_events_pass_in_any_order")
class TestOrdered(ObserverContract):
    component = observer_of(Ordered)


@caught_by("test_failed_run_is_borne")
class TestUnforgiving(ObserverContract):
    component = observer_of(Unforgiving)


@caught_by("test_weights_and_process_are_left_alone")
class TestMeddling(ObserverContract):
    component = observer_of(Meddling)


@caught_by("test_planned_samples_are_steps_of_the_run")
class TestBeyondTheEnd(ObserverContract):
    component = observer_of(Unforgiving, steps=[10**6])


class Wordy(Command):
    """Do something whose description goes on and on so that its first line is no longer one line of
    help, which is what a list of commands shows.
    """

    def run(self) -> int:
        return 0


Wordy.__doc__ = " ".join((Wordy.__doc__ or "").split())


class Misplaced(Command):
    """Take a word that is no option."""

    positional: ClassVar[tuple[str, ...]] = ("gone",)

    def run(self) -> int:
        return 0


class Codeless(Command):
    """End without an exit code."""

    def run(self) -> int:
        return None  # type: ignore[return-value]


class Messy(Command):
    """Refuse a number only after a file was written."""

    number: int = Field(0, description="A number.")

    def run(self) -> int:
        Path("half").write_text("half", encoding="utf-8")
        if self.number < 0:
            raise UserError.of("--number", "is negative")
        return 0


@caught_by("test_help_tells_all_of_it")
class TestWordy(CommandContract):
    component = Wordy


@caught_by("test_positional_words_are_options")
class TestMisplaced(CommandContract):
    component = Misplaced


@caught_by("test_it_succeeds")
class TestCodeless(CommandContract):
    component = Codeless


@caught_by("test_mistakes_are_refused")
class TestMessy(CommandContract):
    component = Messy
    mistakes = [{"number": -1}]


# ----------------------------------------------------------------------------------------- models


def model_of(tamper: Callable[[Any], None]) -> type[Sdxl]:
    """Make an SDXL whose loaded model is tampered with."""

    class Mutant(Sdxl):
        """A family."""

        def build(self, device: Any, dtype: Any) -> Any:
            loaded = super().build(device, dtype)
            tamper(loaded)
            return loaded

    return Mutant


def thawed(model: Any) -> None:
    model.denoiser.requires_grad_(True)


def twice_named(model: Any) -> None:
    part = model.parts[0]
    name = next(iter(part.file_names.values()))
    names = dict.fromkeys(part.file_names, name)
    model._parts = (dataclasses.replace(part, file_names=names), *model.parts[1:])


def less_on_meta(model: Any) -> None:
    if model.denoiser.conv_in.weight.is_meta:
        model._parts = model._parts[:1]


def blurred(model: Any) -> None:
    encode = model.encode_images
    model.encode_images = lambda images: encode(images) + torch.rand(1)


def mingled(model: Any) -> None:
    encode = model.encode_text
    model.encode_text = lambda captions: {
        name: tensor + tensor.mean(0) for name, tensor in encode(captions).items()
    }


def uncounted(model: Any) -> None:
    model.count_tokens = lambda captions: [min(7, len(caption)) for caption in captions]


def other_prompts(model: Any) -> None:
    model.encode_prompts = lambda prompts: model.encode_text([f"{p}!" for p in prompts])


def timeless(model: Any) -> None:
    predict = model.predict
    model.predict = lambda noisy, timesteps, condition: predict(noisy, timesteps * 0, condition)


def negative(model: Any) -> None:
    model.target = lambda latents, noise, timesteps: -noise


def rising(model: Any) -> None:
    model.schedule = dataclasses.replace(
        model.schedule, alphas_cumprod=model.schedule.alphas_cumprod.flip(0)
    )


def anonymous(model: Any) -> None:
    model.image_encoder_identity = lambda: {"the VAE": "the same"}


def illiterate(model: Any) -> None:
    model.read_network = lambda path: {}


def moody(model: Any) -> None:
    make = model.sampler
    generator = torch.Generator()
    generator.seed()

    def sampler() -> Any:
        sample = make()
        return lambda request, text: sample(request, text) * torch.rand(1, generator=generator)

    model.sampler = sampler


def talkative(model: Any) -> None:
    model.metadata = lambda: {"ss_sd_model_name": "/home/me/model.safetensors"}


def hoarding(model: Any) -> None:
    model.release_text_encoders = lambda: None


def seeding(model: Any) -> None:
    torch.manual_seed(0)


class OnOneTinyModel(ModelContract):
    """Spares each mutant writing the model that all of them break alike."""

    @pytest.fixture(scope="class")
    @classmethod
    def path(cls, tiny_model: TinyModel) -> Path:
        return tiny_model.path


@caught_by("test_base_is_frozen")
class TestThawed(OnOneTinyModel):
    component = model_of(thawed)


@caught_by("test_parts_name_layers_that_exist")
class TestTwiceNamed(OnOneTinyModel):
    component = model_of(twice_named)


@caught_by("test_plan_needs_no_weights")
class TestLessOnMeta(OnOneTinyModel):
    component = model_of(less_on_meta)


@caught_by("test_images_become_latents")
class TestBlurred(OnOneTinyModel):
    component = model_of(blurred)


@caught_by("test_captions_are_encoded_one_by_one")
class TestMingled(OnOneTinyModel):
    component = model_of(mingled)


@caught_by("test_tokens_are_counted")
class TestUncounted(OnOneTinyModel):
    component = model_of(uncounted)


@caught_by("test_prompts_are_encoded_like_captions")
class TestOtherPrompts(OnOneTinyModel):
    component = model_of(other_prompts)


@caught_by("test_prediction_is_that_of_the_latents_shape")
class TestTimeless(OnOneTinyModel):
    component = model_of(timeless)


@caught_by("test_target_is_that_of_the_schedule")
class TestNegativeTarget(OnOneTinyModel):
    component = model_of(negative)


@caught_by("test_schedule_falls")
class TestRising(OnOneTinyModel):
    component = model_of(rising)


@caught_by("test_identities_tell_models_apart")
class TestAnonymous(OnOneTinyModel):
    component = model_of(anonymous)


@caught_by("test_network_is_read_under_its_names")
class TestIlliterate(OnOneTinyModel):
    component = model_of(illiterate)


@caught_by("test_picture_is_the_same_each_time")
class TestMoody(OnOneTinyModel):
    component = model_of(moody)


@caught_by("test_metadata_is_text")
class TestTalkative(OnOneTinyModel):
    component = model_of(talkative)


@caught_by("test_encoders_can_be_freed")
class TestHoarding(OnOneTinyModel):
    component = model_of(hoarding)
    options = {"network_train_unet_only": True}


@caught_by("test_process_is_left_alone")
class TestSeeding(OnOneTinyModel):
    component = model_of(seeding)
