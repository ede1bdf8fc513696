"""From what the user gave to a checked configuration, with every mistake on the way.

Values come from the defaults, a TOML file and the command line, in rising order; each keeps its
origin. The names among them choose components, the others become the options of the chosen ones.
What nothing consumes is a mistake.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sdxl_train.components import KINDS, Component, Kind, Model, Observer, OptionModel
from sdxl_train.config import (
    CORE_OPTIONS,
    SINGLE_KINDS,
    STACKED_KINDS,
    ComponentOptions,
    HostOptions,
    OutputOptions,
    RunConfig,
    TrainingOptions,
)
from sdxl_train.data.dataset_options import DatasetOptions
from sdxl_train.errors import Problem
from sdxl_train.metadata_options import MetadataOptions
from sdxl_train.options import Setting, Words, options_of, parse_pairs, suggestion, validate
from sdxl_train.plugins import PluginError
from sdxl_train.process_options import ProcessOptions
from sdxl_train.settings import is_on, texts_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sdxl_train.plugins import PluginHost
    from sdxl_train.registry import Entry, Registry

OptionsT = TypeVar("OptionsT", bound=OptionModel)

REFUSED = {
    "dataset_class": (
        "is not taken: a class in place of all that reads, checks and caches the data",
        "describe the data with --dataset_config, --train_data_dir or --in_json",
    ),
}
"""Options of sd-scripts that are refused, with the reason and what to do instead."""

_SHORT_FOR = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}
"""sd-scripts' old switches, by the optimizer that each one chooses."""


@dataclass(kw_only=True)
class Resolution:
    """What came of the user's settings: a configuration unless the mistakes forbid one."""

    config: RunConfig | None
    model: type[Model] | None
    """The family of base models, as far as it is known."""
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
        self._settle_other_spellings()
        choices = self._core(ComponentOptions) or ComponentOptions()
        entries = [*self._single_entries(choices), *self._stacked_entries(choices)]
        built = [(entry, self._build(entry)) for entry in entries]
        training, output = self._core(TrainingOptions), self._core(OutputOptions)
        metadata, dataset = self._core(MetadataOptions), self._core(DatasetOptions)
        processes = self._core(ProcessOptions)
        self._refuse_collisions(entries)
        self._refuse_leftovers(entries)
        config = None
        whole = host and training and output and metadata and processes and dataset
        if whole and self._complete(built):
            config = self._config(
                built,
                host=host,
                training=training,
                output=output,
                metadata=metadata,
                processes=processes,
                dataset=dataset,
            )
        model = next((e.component for e in entries if issubclass(e.component, Model)), None)
        return Resolution(
            config=config,
            model=model,
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

    def _settle_other_spellings(self) -> None:
        """Let what sd-scripts spells in several ways choose a component in one."""
        for option, name in _SHORT_FOR.items():
            setting = self.settings.get(option)
            if setting is None or not is_on(setting):
                continue
            other = self.settings.get("optimizer_type")
            if other is not None:
                message, remedy = "both say which optimizer", "leave one of them out"
                place = f"{setting.place}, {other.place}"
                self.problems.append(Problem(place=place, message=message, remedy=remedy))
            self.settings["optimizer_type"] = replace(setting, value=name)
        self._choose_by_switches()
        by_class = self.settings.get("lr_scheduler_type")
        name = " ".join(texts_of(by_class))
        if by_class is None or not name:
            return
        if "lr_scheduler" in self.settings:
            self.notices.append(
                f"{self.settings['lr_scheduler'].place} has no effect: {by_class.place} takes "
                "precedence"
            )
        path = name if "." in name else f"torch.optim.lr_scheduler.{name}"
        self.settings["lr_scheduler"] = replace(by_class, value=path)

    def _choose_by_switches(self) -> None:
        """Let switches choose the components that they belong to, of installed plugins too."""
        core = {name for model in CORE_OPTIONS for name in model.model_fields}
        for option in [name for name in self.settings if name not in core]:
            setting = self.settings[option]
            for entry in self.registry.owners(option):
                selector = entry.kind.selector
                chosen = option in entry.component.chosen_by and is_on(setting)
                if chosen and selector not in self.settings:
                    self.settings[selector] = replace(setting, value=entry.qualified)

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
            return dict(given.keys)
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
        if name in REFUSED:
            return REFUSED[name]
        for entry in entries:
            if name in entry.args:
                return (
                    f"is an option of {entry.kind.name} {entry.name}",
                    f"write --{entry.kind.args} {name}=...",
                )
        owners = self.registry.owners(name)
        if owners:
            kind, plugin = owners[0].kind, owners[0].plugin
            names = ", ".join(owner.name for owner in owners if owner.kind is kind)
            if plugin not in self.host.enabled:
                return (
                    f"is an option of {kind.name} {names}, of plugin '{plugin}', which is not "
                    f"enabled",
                    f"add --plugin {plugin}",
                )
            return (
                f"is an option of {kind.name} {names}, which this run does not use",
                f"add --{kind.selector} {owners[0].name}, or leave it out",
            )
        known = [option for model in CORE_OPTIONS for option in options_of(model)]
        known += [option for entry in self.registry.all_entries() for option in entry.flags]
        hint = suggestion(name, sorted(set(known)))
        return "unknown option", hint or "`sdxl-train --help` lists all"

    def _complete(self, built: Iterable[tuple[Entry, Component | None]]) -> bool:
        kinds = {entry.kind.name for entry, component in built if component is not None}
        return all(kind.name in kinds for kind in SINGLE_KINDS)

    def _config(
        self,
        built: list[tuple[Entry, Component | None]],
        **core: Any,
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
            entries=entries,
            plugins=tuple(plugin.found for plugin in self.host.enabled.values()),
            settings=self.settings,
            **core,
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
