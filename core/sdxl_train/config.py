"""From what the user gave to a checked configuration of the run.

Values come from the defaults, a TOML file and the command line, in rising order; each keeps its
origin. The names among them choose components, the others become the options of the chosen ones.
What nothing consumes is a mistake.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003 - pydantic needs it
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from pydantic import Field

from sdxl_train.components import (
    KINDS,
    Component,
    Kind,
    Loss,
    Model,
    Network,
    Noise,
    Observer,
    Optimizer,
    OptionModel,
    Scheduler,
    Timesteps,
    Weighting,
)
from sdxl_train.data.dataset_config import DatasetOptions
from sdxl_train.errors import Problem
from sdxl_train.options import Setting, Words, options_of, parse_pairs, suggestion, validate
from sdxl_train.plugins import PluginError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sdxl_train.plugins import FoundPlugin, PluginHost
    from sdxl_train.registry import Entry, Registry

OptionsT = TypeVar("OptionsT", bound=OptionModel)


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


class ComponentOptions(OptionModel):
    """Which component of each kind the run uses. PLUGIN:NAME says whose, where several have it."""

    model_type: str | None = Field(None, description="Family of the base model.")
    network_module: str | None = Field(None, description="Network to train.")
    network_args: list[str] | dict[str, Any] | None = Field(
        None, description="Further options of the network, as key=value."
    )
    optimizer_type: str | None = Field(None, description="Optimizer.")
    optimizer_args: list[str] | dict[str, Any] | None = Field(
        None, description="Further options of the optimizer, as key=value."
    )
    lr_scheduler: str | None = Field(None, description="Learning-rate schedule.")
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
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        "no", description="Precision of the frozen weights and of the computation."
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of all randomness. Default: a random one."
    )
    strict_observers: bool = Field(
        False, description="End the run when an observer fails, instead of going on without it."
    )


class OutputOptions(OptionModel):
    """What is written, where, and how often."""

    output_dir: Path = Field(description="Folder for the network, its checkpoints and the record.")
    output_name: str | None = Field(
        None, description="Stem of the file names. Default: last, at, epoch, as in sd-scripts."
    )
    save_model_as: Literal["safetensors"] = Field("safetensors", description="File format.")
    save_precision: Literal["float", "fp16", "bf16"] | None = Field(
        None, description="Type of the saved weights. Default: as they train (float)."
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
    no_metadata: bool = Field(
        False, description="Save only the metadata that clients need to load the file."
    )
    training_comment: str | None = Field(None, description="Free text for the metadata.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A checked configuration: every value valid, every name resolved, nothing left over."""

    host: HostOptions
    training: TrainingOptions
    output: OutputOptions
    dataset: DatasetOptions
    model: Model
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

    def options(self) -> dict[str, dict[str, Any]]:
        """Give the value and origin of every option in use, as plain JSON values."""
        resolved: dict[str, dict[str, Any]] = {}
        groups: list[tuple[str, OptionModel]] = [
            ("", self.host),
            ("", self.training),
            ("", self.output),
            ("", self.dataset),
        ]
        for entry, component in zip(self.entries, self.components, strict=True):
            selector = entry.kind.selector
            if not entry.kind.stacked:
                resolved[selector] = {"value": entry.name, "origin": self._origin(selector)}
            groups.append((f"{entry.kind.args}." if entry.kind.args else "", component))
        for prefix, model in groups:
            own = _own_args(model) if prefix else set()
            for name, value in model.model_dump(mode="json").items():
                key = f"{prefix}{name}" if name in own else name
                resolved[key] = {"value": value, "origin": self._origin(key)}
        return resolved

    @property
    def components(self) -> tuple[Component, ...]:
        """The components in the order of ``entries``."""
        return (
            self.model,
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


def _own_args(model: OptionModel) -> set[str]:
    base = next(kind.base for kind in KINDS if isinstance(model, kind.base))
    return set(options_of(type(model), inherited_from=base))


CORE_OPTIONS: tuple[type[OptionModel], ...] = (
    HostOptions,
    ComponentOptions,
    TrainingOptions,
    OutputOptions,
    DatasetOptions,
)
"""The option groups that the framework itself owns, in the order of help."""

SINGLE_KINDS = tuple(kind for kind in KINDS if kind.selector and not kind.stacked)
STACKED_KINDS = tuple(kind for kind in KINDS if kind.stacked)


@dataclass(kw_only=True)
class Resolution:
    """What came of the user's settings: a configuration unless the mistakes forbid one."""

    config: RunConfig | None
    problems: list[Problem]
    notices: list[str]
    dataset: DatasetOptions | None
    settings: Mapping[str, Setting]

    def place(self, name: str) -> str:
        """Give the place to name in a message about option ``name``."""
        setting = self.settings.get(name)
        return setting.place if setting else f"--{name}"


class Resolver:
    """Turns settings into a :class:`RunConfig`, collecting every mistake on the way."""

    def __init__(
        self, settings: Mapping[str, Setting], host: PluginHost, registry: Registry
    ) -> None:
        self.settings = dict(settings)
        self.host = host
        self.registry = registry
        self.problems: list[Problem] = []
        self.notices: list[str] = []
        self._consumed: set[str] = set()

    def resolve(self) -> Resolution:
        """Resolve everything; see :class:`Resolution`."""
        host = self._core(HostOptions)
        self._enable_plugins()
        choices = self._core(ComponentOptions) or ComponentOptions()
        entries = [*self._single_entries(choices), *self._stacked_entries(choices)]
        built = [(entry, self._build(entry)) for entry in entries]
        training, output = self._core(TrainingOptions), self._core(OutputOptions)
        dataset = self._core(DatasetOptions)
        self._refuse_collisions(entries)
        self._refuse_leftovers(entries)
        config = None
        if host and training and output and dataset and self._complete(built):
            config = self._config(built, host, training, output, dataset)
        return Resolution(
            config=config,
            problems=self.problems,
            notices=self.notices,
            dataset=dataset,
            settings=self.settings,
        )

    def _enable_plugins(self) -> None:
        setting = self.settings.get("plugin")
        names = list(HostOptions.model_fields["plugin"].default)
        if setting is not None:
            value = setting.value
            names = list(value.words) if isinstance(value, Words) else _texts(value)
        place = setting.place if setting else "--plugin"
        self.host.apply([(name, place) for name in names], self.problems)

    def _core(self, model: type[OptionsT]) -> OptionsT | None:
        mine = {name: s for name, s in self.settings.items() if name in model.model_fields}
        self._consumed.update(mine)
        return cast("OptionsT | None", validate(model, mine, self.problems))

    def _single_entries(self, choices: ComponentOptions) -> list[Entry]:
        entries = []
        for kind in SINGLE_KINDS:
            name = getattr(choices, kind.selector)
            # A wrong name is a problem by now; the default lets the other checks go on.
            entry = (self._find(kind, name) if name else None) or self.registry.default(kind)
            if entry is not None:
                entries.append(entry)
            elif not name:
                self.problems.append(
                    Problem(
                        place=f"--{kind.selector}",
                        message=f"is required: no enabled plugin has a default {kind.name}",
                    )
                )
        return entries

    def _stacked_entries(self, choices: ComponentOptions) -> list[Entry]:
        active = []
        for kind in STACKED_KINDS:
            named = [self._find(kind, name) for name in getattr(choices, kind.selector)]
            wanted = {entry.component for entry in named if entry is not None}
            for entry in self.registry.entries(kind):
                is_set = any(name in self.settings for name in entry.flags)
                always = issubclass(entry.component, Observer) and entry.component.always
                if entry.component in wanted or is_set or always:
                    active.append(entry)
                    wanted.discard(entry.component)
            # A class named by its dotted path is in no registry.
            active += [e for e in named if e is not None and e.component in wanted]
        return active

    def _find(self, kind: Kind, name: str) -> Entry | None:
        try:
            return self.registry.find(kind, name)
        except PluginError as error:
            setting = self.settings.get(kind.selector)
            place = setting.place if setting else f"--{kind.selector}"
            self.problems.append(Problem(place=place, message=str(error)))
            return None

    def _build(self, entry: Entry) -> Component | None:
        mine = {name: self.settings[name] for name in entry.flags if name in self.settings}
        self._consumed.update(mine)
        mine |= self._args(entry)
        return cast("Component | None", validate(entry.component, mine, self.problems))

    def _args(self, entry: Entry) -> dict[str, Setting]:
        """Take the ``key=value`` options of a component out of its args option."""
        name = entry.kind.args
        if name is None or name not in self.settings:
            return {}
        given = self.settings[name]
        pairs = self._pairs(given)
        known: dict[str, Setting] = {}
        for key, setting in pairs.items():
            if key in entry.args:
                known[key] = setting
                self.settings[f"{name}.{key}"] = setting
                self._consumed.add(f"{name}.{key}")
            elif key in entry.flags:
                self.problems.append(
                    Problem(
                        place=setting.place,
                        message=f"{key} is an option of its own",
                        remedy=f"write --{key}",
                    )
                )
            else:
                hint = suggestion(key, list(entry.args)) or "it takes none of its own"
                self.problems.append(
                    Problem(
                        place=setting.place,
                        message=f"{entry.kind.name} {entry.name} has no option '{key}'",
                        remedy=hint,
                    )
                )
        return known

    def _pairs(self, given: Setting) -> dict[str, Setting]:
        if isinstance(given.value, Words):
            return parse_pairs(given.value.words, given.place, given.origin, self.problems)
        if isinstance(given.value, dict):
            return {
                str(key): Setting(value=value, place=f"{given.place}.{key}", origin=given.origin)
                for key, value in given.value.items()
            }
        return parse_pairs(_texts(given.value), given.place, given.origin, self.problems)

    def _refuse_collisions(self, entries: Sequence[Entry]) -> None:
        """Refuse two owners of one option: neither could be set without the other."""
        owners = {
            name: "sdxl-train itself" for model in CORE_OPTIONS for name in model.model_fields
        }
        for entry in entries:
            owner = f"{entry.kind.name} {entry.qualified}"
            for name in entry.flags:
                if name in owners:
                    self.problems.append(
                        Problem(
                            place=f"--{name}",
                            message=f"is an option of both {owners[name]} and {owner}",
                            remedy=f"leave one of them out, or block plugin '{entry.plugin}'",
                        )
                    )
                owners.setdefault(name, owner)

    def _refuse_leftovers(self, entries: Sequence[Entry]) -> None:
        for name, setting in self.settings.items():
            if name in self._consumed:
                continue
            message, remedy = self._explain_leftover(name, entries)
            self.problems.append(Problem(place=setting.place, message=message, remedy=remedy))

    def _explain_leftover(self, name: str, entries: Sequence[Entry]) -> tuple[str, str]:
        for entry in entries:
            if name in entry.args:
                return (
                    f"is an option of {entry.kind.name} {entry.name}",
                    f"write --{entry.kind.args} {name}=...",
                )
        owners = [entry for entry in self.registry.all_entries() if name in entry.flags]
        if owners:
            owner = owners[0]
            return (
                f"is an option of {owner.kind.name} {owner.name}, which this run does not use",
                f"add --{owner.kind.selector} {owner.name}, or leave it out",
            )
        known = [option for model in CORE_OPTIONS for option in options_of(model)]
        known += [option for entry in self.registry.all_entries() for option in entry.flags]
        return "unknown option", suggestion(name, sorted(set(known)))

    def _complete(self, built: Iterable[tuple[Entry, Component | None]]) -> bool:
        kinds = {entry.kind.name for entry, component in built if component is not None}
        return all(kind.name in kinds for kind in SINGLE_KINDS)

    def _config(
        self,
        built: list[tuple[Entry, Component | None]],
        host: HostOptions,
        training: TrainingOptions,
        output: OutputOptions,
        dataset: DatasetOptions,
    ) -> RunConfig:
        chosen: dict[str, list[tuple[Entry, Component]]] = {kind.name: [] for kind in KINDS}
        for entry, component in built:
            if component is not None and (not entry.kind.stacked or component.active()):
                chosen[entry.kind.name].append((entry, component))
        order = [kind.name for kind in (*SINGLE_KINDS, *STACKED_KINDS)]
        entries = tuple(entry for kind in order for entry, _ in chosen[kind])
        single: dict[str, Any] = {kind.name: chosen[kind.name][0][1] for kind in SINGLE_KINDS}
        stacked: dict[str, Any] = {
            f"{kind.name}s": tuple(component for _, component in chosen[kind.name])
            for kind in STACKED_KINDS
        }
        self._note_idle_plugins(entries)
        return RunConfig(
            host=host,
            training=training,
            output=output,
            dataset=dataset,
            entries=entries,
            plugins=tuple(plugin.found for plugin in self.host.enabled.values()),
            settings=self.settings,
            **single,
            **stacked,
        )

    def _note_idle_plugins(self, entries: Sequence[Entry]) -> None:
        used = {entry.plugin for entry in entries}
        for plugin in self.host.enabled.values():
            if plugin.components and plugin.name not in used:
                self.notices.append(
                    f"plugin '{plugin.name}' is enabled, but the run uses none of its components"
                )


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else []
