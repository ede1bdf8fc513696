"""Names to components: every name resolves to exactly one provider, or the error names them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdxl_train.components import KINDS, Component, Kind
from sdxl_train.errors import PluginError
from sdxl_train.library_components import LIBRARY_KINDS
from sdxl_train.loading import component_fault
from sdxl_train.options import Option, options_of, suggestion
from sdxl_train.plugins import BUILTIN
from sdxl_train.siblings import sibling_with

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.plugins import LoadedPlugin, PluginHost

logger = logging.getLogger(__name__)

KIND_BY_NAME = {kind.name: kind for kind in KINDS}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A component under one of its names.

    Attributes:
        plugin: Name of the plugin that provides it; the dotted module for a class that the user
            named by its path.
    """

    kind: Kind
    name: str
    component: type[Component]
    plugin: str

    @property
    def qualified(self) -> str:
        """The name that leaves no doubt: ``lycoris:lora``."""
        return f"{self.plugin}:{self.name}"

    @property
    def flags(self) -> dict[str, Option]:
        """The options of this component that are flags and top-level TOML keys."""
        return {name: opt for name, opt in options_of(self.component).items() if not opt.args}

    @property
    def args(self) -> dict[str, Option]:
        """The options that are ``key=value`` words of the kind's args option."""
        return {name: opt for name, opt in options_of(self.component).items() if opt.args}


class UnknownNameError(PluginError):
    """No component, or more than one, has the name that the run gives."""


class Registry:
    """The components of the enabled plugins, and the way to those of the others."""

    def __init__(self, host: PluginHost) -> None:
        self.host = host

    def entries(self, kind: Kind) -> list[Entry]:
        """Give the components of a kind: built-in ones first, then by plugin name."""
        plugins = sorted(
            self.host.enabled.values(), key=lambda plugin: (plugin.name != BUILTIN, plugin.name)
        )
        return [entry for plugin in plugins for entry in _entries(plugin, kind)]

    def all_entries(self) -> Iterator[Entry]:
        """Give every component of the enabled plugins."""
        for kind in KINDS:
            yield from self.entries(kind)

    def installed_entries(self) -> list[Entry]:
        """Give every component of the installed plugins that are neither enabled nor blocked."""
        return [
            entry
            for plugin in self.host.load_rest()
            for kind in KINDS
            for entry in _entries(plugin, kind)
        ]

    def default(self, kind: Kind) -> Entry | None:
        """Give the component that serves when the run names none."""
        for entry in self.entries(kind):
            if entry.component.default and entry.plugin == BUILTIN:
                return entry
        return None

    def owners(self, option: str) -> list[Entry]:
        """Give the components with a flag of this name: of the enabled plugins, else of the others.

        Components that share one class, under several names, count once.
        """
        kinds = [kind for kind in KINDS if kind.selector]
        enabled = [entry for kind in kinds for entry in self.entries(kind)]
        found = _with_flag(enabled, option)
        if found:
            return found
        rest = self.host.load_rest()
        return _with_flag(
            [e for plugin in rest for kind in kinds for e in _entries(plugin, kind)], option
        )

    def find(self, kind: Kind, name: str) -> Entry:
        """Resolve a name as the run gives it.

        ``PLUGIN:NAME`` is exact. A bare name is looked for in the enabled plugins, then in the
        installed ones, where a single provider is enabled. A dotted path that is nobody's name
        is imported: the user named it.

        Raises:
            UnknownNameError: If there is no such component, or more than one.
            PluginError: If the plugin that was named is not there, blocked or broken.
        """
        entry = self._found(kind, name)
        return replace(entry, component=entry.component.resolved())

    def _found(self, kind: Kind, name: str) -> Entry:
        plugin_name, colon, bare = name.partition(":")
        if colon:
            return self._qualified(kind, plugin_name, bare)
        here = _named(self.entries(kind), name)
        if not here:
            rest = [e for plugin in self.host.load_rest() for e in _entries(plugin, kind)]
            here = _named(rest, name)
        if len(here) > 1:
            choices = " or ".join(entry.qualified for entry in here)
            raise UnknownNameError(
                f"{len(here)} plugins provide the {kind.name} '{name}'; write {choices}"
            )
        if here:
            return self._enabled(here[0])
        if "." in name:
            return self._imported(kind, name)
        raise UnknownNameError(self._unknown(kind, name))

    def _enabled(self, entry: Entry) -> Entry:
        if entry.plugin not in self.host.enabled:
            plugin = self.host.enable(entry.plugin)
            logger.info(
                "plugin %s enabled: it provides %s %s", plugin.found, entry.kind.name, entry.name
            )
        return entry

    def _qualified(self, kind: Kind, plugin_name: str, name: str) -> Entry:
        plugin = self.host.enable(plugin_name)
        found = _named(_entries(plugin, kind), name)
        if not found:
            offered = [entry.name for entry in _entries(plugin, kind)]
            hint = suggestion(name, offered) or f"it provides none of kind {kind.name}"
            raise UnknownNameError(f"plugin '{plugin_name}' has no {kind.name} '{name}'; {hint}")
        return found[0]

    def _imported(self, kind: Kind, path: str) -> Entry:
        """Load what a dotted path names: a component, or a library's class to make one of."""
        module_name, _, class_name = path.rpartition(".")
        package = path.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise UnknownNameError(
                f"{self._unknown(kind, path)}; no package '{package}' is installed either: "
                f"if that is its name, pip install {package.replace('_', '-')}"
            )
        try:
            target = getattr(importlib.import_module(module_name), class_name)
        except (Exception, SystemExit) as error:
            # The user's own module may fail in any way.
            raise UnknownNameError(
                f"{self._unknown(kind, path)}; nor can it be imported: "
                f"{type(error).__name__}: {error}"
            ) from error
        library = LIBRARY_KINDS.get(kind.name)
        is_component = isinstance(target, type) and issubclass(target, Component)
        component = library.of(path).resolved() if library and not is_component else target
        if not (isinstance(component, type) and issubclass(component, kind.base)):
            raise UnknownNameError(
                f"{path} is not a subclass of sdxl_train.{kind.base.__name__}, "
                f"so it cannot serve as {kind.name}"
            )
        fault = component_fault(component)
        if fault:
            raise UnknownNameError(f"{path} cannot serve as {kind.name}: {fault}")
        return Entry(kind=kind, name=path, component=component, plugin=module_name)

    def _unknown(self, kind: Kind, name: str) -> str:
        installed = [*self.host.enabled.values(), *self.host.load_rest()]
        names = [entry.name for plugin in installed for entry in _entries(plugin, kind)]
        hint = (
            suggestion(name, sorted(set(names)))
            or f"`sdxl-train components {kind.name}` lists those of the enabled plugins"
        )
        text = f"no {kind.name} is called '{name}'"
        sibling = sibling_with(kind.name, name)
        if sibling is not None and sibling not in {p.found.distribution for p in installed}:
            hint = f"{sibling} has it: pip install {sibling}"
        broken = ", ".join(f"'{plugin}'" for plugin in sorted(self.host.failures))
        notes = [hint, f"plugins that do not load were not asked: {broken}" if broken else ""]
        return "; ".join([text, *(note for note in notes if note)])


def _entries(plugin: LoadedPlugin, kind: Kind) -> list[Entry]:
    return [
        Entry(kind=kind, name=name, component=component, plugin=plugin.name)
        for name, component in plugin.components.get(kind.name, {}).items()
    ]


def _named(entries: list[Entry], name: str) -> list[Entry]:
    """Give the entry of each plugin that has the name; case matters only within a plugin."""
    found: dict[str, Entry] = {}
    for entry in entries:
        is_exact = entry.name == name
        if is_exact or (entry.name.lower() == name.lower() and entry.plugin not in found):
            found[entry.plugin] = entry
    return list(found.values())


def _with_flag(entries: list[Entry], option: str) -> list[Entry]:
    by_class = {entry.component: entry for entry in reversed(entries) if option in entry.flags}
    return list(reversed(by_class.values()))
