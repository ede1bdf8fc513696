"""Names to components: every name resolves to exactly one provider, or the error names them."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_train.components import KINDS, Component, Kind
from sdxl_train.options import Option, options_of, suggestion
from sdxl_train.plugins import BUILTIN, PluginError

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
        if self.kind.args is None:
            return options_of(self.component)
        return {
            name: option
            for name, option in options_of(self.component).items()
            if name in self.kind.base.model_fields
        }

    @property
    def args(self) -> dict[str, Option]:
        """The options that are ``key=value`` words of the kind's args option."""
        if self.kind.args is None:
            return {}
        return options_of(self.component, inherited_from=self.kind.base)


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

    def default(self, kind: Kind) -> Entry | None:
        """Give the component that serves when the run names none."""
        for entry in self.entries(kind):
            if entry.component.default and entry.plugin == BUILTIN:
                return entry
        return None

    def find(self, kind: Kind, name: str) -> Entry:
        """Resolve a name as the run gives it.

        ``PLUGIN:NAME`` is exact. A bare name is looked for in the enabled plugins, then in the
        installed ones, where a single provider is enabled. A dotted path that is nobody's name
        is imported: the user named it.

        Raises:
            UnknownNameError: If there is no such component, or more than one.
            PluginError: If the plugin that was named is not there, blocked or broken.
        """
        plugin_name, colon, bare = name.partition(":")
        if colon:
            return self._qualified(kind, plugin_name, bare)
        here = _named(self.entries(kind), name)
        if len(here) == 1:
            return here[0]
        if here:
            raise UnknownNameError(_ambiguous(kind, name, here))
        elsewhere = [
            entry
            for plugin in self.host.load_rest()
            for entry in _named(_entries(plugin, kind), name)
        ]
        if len(elsewhere) == 1:
            self.host.enable(elsewhere[0].plugin)
            logger.info("plugin '%s' enabled: it provides %s", elsewhere[0].plugin, name)
            return elsewhere[0]
        if elsewhere:
            raise UnknownNameError(_ambiguous(kind, name, elsewhere))
        if "." in name:
            return _imported(kind, name)
        raise UnknownNameError(self._unknown(kind, name))

    def _qualified(self, kind: Kind, plugin_name: str, name: str) -> Entry:
        plugin = self.host.enable(plugin_name)
        found = _named(_entries(plugin, kind), name)
        if not found:
            offered = [entry.name for entry in _entries(plugin, kind)]
            hint = suggestion(name, offered) or f"it provides none of kind {kind.name}"
            raise UnknownNameError(f"plugin '{plugin_name}' has no {kind.name} '{name}'; {hint}")
        return found[0]

    def _unknown(self, kind: Kind, name: str) -> str:
        installed = [*self.host.enabled.values(), *self.host.load_rest()]
        names = [entry.name for plugin in installed for entry in _entries(plugin, kind)]
        hint = suggestion(name, sorted(set(names)))
        text = f"no {kind.name} is called '{name}'"
        broken = ", ".join(f"'{plugin}'" for plugin in sorted(self.host.failures))
        notes = [hint, f"plugins that do not load were not asked: {broken}" if broken else ""]
        return "; ".join([text, *(note for note in notes if note)])


def _entries(plugin: LoadedPlugin, kind: Kind) -> list[Entry]:
    return [
        Entry(kind=kind, name=name, component=component, plugin=plugin.name)
        for name, component in plugin.components.get(kind.name, {}).items()
    ]


def _named(entries: list[Entry], name: str) -> list[Entry]:
    exact = [entry for entry in entries if entry.name == name]
    return exact or [entry for entry in entries if entry.name.lower() == name.lower()]


def _ambiguous(kind: Kind, name: str, entries: list[Entry]) -> str:
    choices = " or ".join(entry.qualified for entry in entries)
    return f"{len(entries)} plugins provide the {kind.name} '{name}'; write {choices}"


def _imported(kind: Kind, path: str) -> Entry:
    module_name, _, class_name = path.rpartition(".")
    try:
        component = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UnknownNameError(
            f"no {kind.name} is called '{path}', and it cannot be imported: {error}"
        ) from error
    if not (isinstance(component, type) and issubclass(component, kind.base)):
        raise UnknownNameError(
            f"{path} is not a subclass of sdxl_train.{kind.base.__name__}, "
            f"so it cannot serve as {kind.name}"
        )
    return Entry(kind=kind, name=path, component=component, plugin=module_name)
