"""The options that the framework itself owns, and the checked configuration of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003 - pydantic needs it
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from pydantic import Field

from sdxl_train.components import (
    KINDS,
    Component,
    Loss,
    Model,
    Network,
    Noise,
    Observer,
    Optimizer,
    OptionModel,
    Quantization,
    Scheduler,
    Timesteps,
    Weighting,
)
from sdxl_train.data.dataset_options import DatasetOptions
from sdxl_train.metadata_options import MetadataOptions
from sdxl_train.options import Setting, options_of
from sdxl_train.process_options import ProcessOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import device
    from torch.optim import Optimizer as TorchOptimizer
    from torch.optim.lr_scheduler import LRScheduler

    from sdxl_train.plugins import FoundPlugin
    from sdxl_train.protocols import StepPlan
    from sdxl_train.registry import Entry

OptionsT = TypeVar("OptionsT", bound=OptionModel)


SaveFormat: TypeAlias = Literal["safetensors", "ckpt", "pt", "diffusers", "diffusers_safetensors"]


class HostOptions(OptionModel):
    """Where options come from and which plugins act."""

    plugin: list[str] = Field(
        [],
        description="Plugin to use: NAME, NAME>=1.0, a ./file.py; no:NAME blocks one. Repeatable.",
    )
    config_file: Path | None = Field(
        None, description="TOML file with any of these options; the command line wins."
    )
    output_config: bool = Field(
        False, description="Write the options that were set to --config_file and exit."
    )

    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = Field(
        None, description="Say nothing that matters less than this. Default: INFO."
    )
    console_log_file: Path | None = Field(
        None, description="Write the log to this file instead, over what is in it."
    )
    console_log_simple: bool = Field(
        False, description="Write lines on a terminal too, no progress bar."
    )


class ComponentOptions(OptionModel):
    """Which component of each kind the run uses. PLUGIN:NAME says whose, where several have it."""

    model_type: str | None = Field(None, description="Family of the base model.")
    base_quantization: str | None = Field(
        None, description="How the frozen weights of the base model are stored."
    )
    network_module: str | None = Field(None, description="Network to train.")
    network_args: list[str] | dict[str, Any] | None = Field(
        None, description="Further options of the network, as key=value."
    )
    optimizer_type: str | None = Field(None, description="Optimizer.")
    optimizer_args: list[str] | dict[str, Any] | None = Field(
        None, description="Further options of the optimizer, as key=value."
    )
    use_8bit_adam: bool = Field(False, description="Short for --optimizer_type AdamW8bit.")
    use_lion_optimizer: bool = Field(False, description="Short for --optimizer_type Lion.")
    lr_scheduler: str | None = Field(None, description="Learning-rate schedule.")
    lr_scheduler_type: str | None = Field(
        None,
        description="Schedule by its class: one of torch's by name, others by dotted path. "
        "Takes precedence over --lr_scheduler.",
    )
    lr_scheduler_args: list[str] | dict[str, Any] | None = Field(
        None, description="Further options of the schedule, as key=value."
    )
    timestep_sampling: str | None = Field(None, description="Distribution of training timesteps.")
    loss_type: str | None = Field(None, description="Loss.")
    noise: list[str] = Field([], description="Noise to add by name. Repeatable.")
    weighting: list[str] = Field([], description="Weighting to add by name. Repeatable.")
    observer: list[str] = Field([], description="Observer to add by name. Repeatable.")


class TrainingOptions(OptionModel):
    """How long and how to train."""

    max_train_steps: int | None = Field(
        None, ge=1, description="Optimizer steps in all. Default 1600, unless epochs are given."
    )
    max_train_epochs: int | None = Field(
        None, ge=1, description="Epochs in all; takes precedence over steps."
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Batches for each optimizer step."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Clip gradients to this norm; 0 = off.")
    fused_backward_pass: bool = Field(
        False,
        description="Step inside the backward pass, so that gradients take no memory. Each one is "
        "clipped by its own norm.",
    )
    check_late: bool = Field(
        True,
        description="On a GPU, find out whether a step was finite while the next one is computed; "
        "the optimizer holds it back by itself. false: wait for each step.",
    )
    pin_memory: bool = Field(
        True,
        description="Let a GPU fetch batches by itself, from memory that stays in its place.",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        "no", description="Precision of the frozen weights and of the computation."
    )
    full_bf16: bool = Field(
        False,
        description="Keep the trained weights and their gradients in bf16 too. Updates are rounded "
        "at random, so that small ones count.",
    )
    full_fp16: bool = Field(False, description="The same in fp16.")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of all randomness. Default: a random one."
    )
    resume: str | None = Field(
        None,
        description="State folder to go on from, or latest: the newest one of this run, if any.",
    )
    reset_optimizer: bool = Field(
        False, description="With --resume: take the weights only, start the optimizer afresh."
    )
    drop_plugin_state: bool = Field(
        False, description="With --resume: do without the observers that kept something in it."
    )
    allow_base_change: bool = Field(
        False, description="With --resume: go on with another base model than the state's."
    )
    initial_step: int | None = Field(
        None, ge=0, description="Begin behind this step: those before count as done."
    )
    initial_epoch: int | None = Field(
        None, ge=1, description="Begin with this epoch, counted from 1. --initial_step wins."
    )
    skip_until_initial_step: bool = Field(
        False, description="For sd-scripts' users; steps before the first are always skipped."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Device to train on; auto takes the best there is and says which."
    )
    validate_every_n_steps: int | None = Field(
        None, ge=0, description="Measure the loss on held-out images each N steps; 0 = off."
    )
    validate_every_n_epochs: int | None = Field(
        None,
        ge=0,
        description="Measure it at the end of each N epochs; 0 = off. Default: of each one.",
    )
    max_validation_steps: int | None = Field(
        None, ge=1, description="Measure it on the first N held-out batches. Default: on all."
    )
    early_stop_patience: int | None = Field(
        None,
        ge=1,
        description="Stop when the loss on held-out images was N times in a row no lower than "
        "before.",
    )
    observer_timeout: float = Field(
        60, ge=0, description="Leave an observer out that takes more seconds in a call; 0 = never."
    )
    strict_observers: bool = Field(
        False, description="End the run when an observer fails, instead of going on without it."
    )

    @property
    def trained_precision(self) -> Literal["no", "fp16", "bf16"]:
        """The precision of the trained weights between steps; ``no`` is fp32."""
        return "bf16" if self.full_bf16 else "fp16" if self.full_fp16 else "no"


class OutputOptions(OptionModel):
    """What is written, where, and how often."""

    output_dir: Path = Field(description="Folder for the network, its checkpoints and the record.")
    output_name: str | None = Field(
        None, description="Stem of the file names. Default: last, at, epoch, as in sd-scripts."
    )
    save_model_as: SaveFormat = Field(
        "safetensors",
        description="Format. ckpt and pt have no metadata; diffusers and diffusers_safetensors are "
        "the same folder of safetensors, for load_lora_weights.",
    )
    save_precision: Literal["float", "fp16", "bf16"] | None = Field(
        None, description="Type of the saved weights. Default: as they train."
    )
    save_every_n_epochs: int | None = Field(None, ge=1, description="Save each N epochs.")
    save_every_n_steps: int | None = Field(None, ge=1, description="Save each N optimizer steps.")
    save_n_epoch_ratio: int | None = Field(
        None, ge=1, description="Save each floor(epochs / N) epochs, at least each epoch."
    )
    save_last_n_epochs: int | None = Field(
        None, ge=1, description="Keep the newest N epoch checkpoints."
    )
    save_last_n_steps: int | None = Field(
        None, ge=1, description="Keep the newest N step checkpoints."
    )
    save_best: bool = Field(
        False,
        description="Keep the network with the lowest loss on held-out images as NAME-best.",
    )
    save_state: bool = Field(
        False, description="With each checkpoint and at the end, save what --resume needs."
    )
    save_state_on_train_end: bool = Field(
        False, description="Save what --resume needs at the end only."
    )
    save_state_every_n_epochs: int | None = Field(
        None, ge=1, description="Save what --resume needs each N epochs, without a network."
    )
    save_state_every_n_steps: int | None = Field(
        None, ge=1, description="Save what --resume needs each N steps, without a network."
    )
    save_last_n_epochs_state: int | None = Field(
        None, ge=1, description="Keep the newest N epoch states. Default: as for checkpoints."
    )
    save_last_n_steps_state: int | None = Field(
        None, ge=1, description="Keep the newest N step states. Default: as for checkpoints."
    )
    overwrite: bool = Field(
        False, description="Write over the files of an earlier run of this name."
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A checked configuration: every value valid, every name resolved, nothing left over."""

    host: HostOptions
    training: TrainingOptions
    output: OutputOptions
    metadata: MetadataOptions
    processes: ProcessOptions
    dataset: DatasetOptions
    model: Model
    quantization: Quantization
    network: Network
    optimizer: Optimizer
    scheduler: Scheduler
    timesteps: Timesteps
    noises: tuple[Noise, ...]
    loss: Loss
    weightings: tuple[Weighting, ...]
    observers: tuple[Observer, ...]
    entries: tuple[Entry, ...]
    """The chosen components under the names that chose them."""
    plugins: tuple[FoundPlugin, ...]
    """The plugins that act in this run."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """What the user gave, by option name; options of ``*_args`` as ``network_args.conv_dim``."""

    def place(self, name: str) -> str:
        """Give the place to name in a message about option ``name``."""
        setting = self.settings.get(name)
        return setting.place if setting else f"--{name}"

    def is_set(self, name: str) -> bool:
        """Tell whether the user gave option ``name``."""
        return name in self.settings

    def name_of(self, kind: str) -> str:
        """Give the name under which the component of a kind was chosen: ``networks.lora``."""
        return next(entry.name for entry in self.entries if entry.kind.name == kind)

    def given_rates(self) -> list[str]:
        """Give the places where the user set learning rates, or factors of them."""
        return [
            self.place(name)
            for name in self.settings
            if name.endswith(("_lr", "_lr1", "_lr2", "_lr_ratio")) or name == "learning_rate"
        ]

    def device(self) -> device:
        """Give where the run would compute on this machine. Imports torch."""
        import torch

        if self.training.device != "auto":
            return torch.device(self.training.device)
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    def build_schedule(self, optimizer: TorchOptimizer, steps: StepPlan) -> LRScheduler:
        """Build the schedule of the run, or the one that its optimizer brings with it."""
        if self.optimizer.brings_schedule() is not None:
            return self.optimizer.build_schedule(optimizer)
        return self.scheduler.build(optimizer, steps)

    def options(self) -> dict[str, dict[str, Any]]:
        """Give the value and origin of every option in use, as plain JSON values.

        The value of a secret is asterisks.
        """
        resolved: dict[str, dict[str, Any]] = {}
        groups: list[OptionModel] = [self.host, self.training, self.output]
        groups += [self.metadata, self.processes, self.dataset]
        for entry, component in zip(self.entries, self.components, strict=True):
            selector = entry.kind.selector
            if not entry.kind.stacked:
                resolved[selector] = {"value": entry.name, "origin": self._origin(selector)}
            groups.append(component)
        for model in groups:
            known = options_of(type(model))
            for name, value in model.model_dump(mode="json").items():
                args = known[name].args
                key = f"{args}.{name}" if args else name
                resolved[key] = {"value": value, "origin": self._origin(key)}
        return resolved

    def secrets(self) -> frozenset[str]:
        """Give the names of the options in use whose values are to be seen nowhere."""
        groups: list[OptionModel] = [self.host, self.training, self.output, self.dataset]
        return frozenset(
            name
            for model in (*groups, *self.components)
            for name, option in options_of(type(model)).items()
            if option.is_secret
        )

    @property
    def components(self) -> tuple[Component, ...]:
        """The components in the order of ``entries``."""
        return (
            self.model,
            self.quantization,
            self.network,
            self.optimizer,
            self.scheduler,
            self.timesteps,
            self.loss,
            *self.noises,
            *self.weightings,
            *self.observers,
        )

    def _origin(self, name: str) -> str:
        setting = self.settings.get(name)
        return setting.origin if setting else "default"


CORE_OPTIONS: tuple[type[OptionModel], ...] = (
    HostOptions,
    ComponentOptions,
    TrainingOptions,
    OutputOptions,
    MetadataOptions,
    ProcessOptions,
    DatasetOptions,
)
"""The option groups that the framework itself owns, in the order of help."""

SINGLE_KINDS = tuple(kind for kind in KINDS if kind.selector and not kind.stacked)
STACKED_KINDS = tuple(kind for kind in KINDS if kind.stacked)
