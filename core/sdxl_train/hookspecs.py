"""Every hook there is.

Questions (``register_*``) are asked once, at start, and answered with component classes by name.
Events are told once per optimizer step or rarer; what they return is ignored. There is no hook
inside a step: components are plain callables there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sdxl_train.checkpoint import Checkpoint
    from sdxl_train.components import (
        Command,
        Loss,
        Model,
        Network,
        Noise,
        Observer,
        Optimizer,
        Quantization,
        Scheduler,
        Timesteps,
        Weighting,
    )
    from sdxl_train.loop import StepResult
    from sdxl_train.observed import Run
    from sdxl_train.pictures import SampledImage
    from sdxl_train.validation import ValidationResult

PROJECT = "sdxl_train"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_models() -> Mapping[str, type[Model]]:
    """Give model families by the name that ``--model_type`` takes."""
    raise NotImplementedError


@hookspec
def register_quantizations() -> Mapping[str, type[Quantization]]:
    """Give formats of frozen weights by the name that ``--base_quantization`` takes."""
    raise NotImplementedError


@hookspec
def register_networks() -> Mapping[str, type[Network]]:
    """Give networks by the name that ``--network_module`` takes."""
    raise NotImplementedError


@hookspec
def register_optimizers() -> Mapping[str, type[Optimizer]]:
    """Give optimizers by the name that ``--optimizer_type`` takes."""
    raise NotImplementedError


@hookspec
def register_schedulers() -> Mapping[str, type[Scheduler]]:
    """Give learning-rate schedules by the name that ``--lr_scheduler`` takes."""
    raise NotImplementedError


@hookspec
def register_timesteps() -> Mapping[str, type[Timesteps]]:
    """Give timestep distributions by the name that ``--timestep_sampling`` takes."""
    raise NotImplementedError


@hookspec
def register_noises() -> Mapping[str, type[Noise]]:
    """Give noise transforms by name; they apply in the order given here."""
    raise NotImplementedError


@hookspec
def register_losses() -> Mapping[str, type[Loss]]:
    """Give losses by the name that ``--loss_type`` takes."""
    raise NotImplementedError


@hookspec
def register_weightings() -> Mapping[str, type[Weighting]]:
    """Give timestep weightings by name; they multiply."""
    raise NotImplementedError


@hookspec
def register_observers() -> Mapping[str, type[Observer]]:
    """Give observers by name."""
    raise NotImplementedError


@hookspec
def register_commands() -> Mapping[str, type[Command]]:
    """Give subcommands by name."""
    raise NotImplementedError


@hookspec(firstresult=True)
def identify_network(keys: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """Name the network component that wrote a file with these keys and this metadata.

    Stops at the first answer that is not None.
    """
    raise NotImplementedError


@hookspec
def run_started(run: Run) -> None:
    """Everything is built and restored; the first step comes next."""


@hookspec
def step_finished(run: Run, step: StepResult) -> None:
    """An optimizer step is done. ``step.loss`` is on the device: reading it waits for it."""


@hookspec
def checkpoint_saved(run: Run, checkpoint: Checkpoint) -> None:
    """A file is complete under its final name."""


@hookspec
def validation_finished(run: Run, result: ValidationResult) -> None:
    """The loss on the held-out images is known."""


@hookspec
def images_sampled(run: Run, images: Sequence[SampledImage]) -> None:
    """Sample images were taken: one for each prompt, failed ones too, in the order of prompts."""


@hookspec
def run_finished(run: Run, error: BaseException | None) -> None:
    """The run is over; ``error`` is why, if it did not come to its end."""


EVENTS: tuple[str, ...] = (
    "run_started",
    "step_finished",
    "checkpoint_saved",
    "validation_finished",
    "images_sampled",
    "run_finished",
)
