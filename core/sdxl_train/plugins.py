"""All plugins of a process: which are there, which are on, and why one is not.

Found, loaded and enabled are three states on purpose: a run imports the plugins that it names, and
one broken plugin never keeps another from working.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import pluggy
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from sdxl_train import hookspecs
from sdxl_train.errors import PluginError, Problem
from sdxl_train.loading import (
    FoundPlugin,
    LoadedPlugin,
    canonical,
    find_plugins,
    found_file,
    load_plugin,
    registered,
)
from sdxl_train.options import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["BUILTIN", "FoundPlugin", "LoadedPlugin", "PluginError", "PluginHost", "PluginRequest"]

logger = logging.getLogger(__name__)

BUILTIN = "sdxl-lora"
"""The plugin that is on unless blocked. It is found like every other, by its entry point."""

PluginState: TypeAlias = Literal["enabled", "installed", "blocked", "broken", "ambiguous"]


@dataclass(frozen=True)
class PluginRequest:
    """One value of ``--plugin``: a name with an optional version range, a file, or a block."""

    name: str
    specifier: SpecifierSet = field(default_factory=SpecifierSet)
    blocks: bool = False
    is_file: bool = False

    @property
    def plugin_name(self) -> str:
        """Name of the plugin that is meant."""
        return Path(self.name).stem if self.is_file else self.name

    @classmethod
    def parse(cls, text: str) -> PluginRequest:
        """Read ``lycoris``, ``lycoris>=0.2``, ``no:lycoris`` or ``./my_hooks.py``.

        Raises:
            ValueError: If the text is none of these.
        """
        text = text.strip()
        blocks = text.startswith("no:")
        if not blocks and (text.endswith(".py") or "/" in text or "\\" in text):
            return cls(text, is_file=True)
        match = _NAME_AND_RANGE.fullmatch(text.removeprefix("no:").strip())
        if not match or (blocks and match[2]):
            raise ValueError(f"{text!r} is not NAME, NAME>=1.0, no:NAME or a .py file")
        try:
            specifier = SpecifierSet(match[2] or "")
        except InvalidSpecifier:
            raise ValueError(f"{match[2]!r} is not a version range such as >=0.2") from None
        return cls(match[1], specifier, blocks)


_NAME_AND_RANGE = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*([<>=!~].*)?")


class PluginHost:
    """The plugins of a process.

    Attributes:
        manager: Holds the hooks of the enabled plugins.
        enabled: The plugins that act, by name.
        blocked: Names that ``no:NAME`` forbids.
        failures: Why a plugin that was asked for could not be loaded.
    """

    def __init__(self, found: Iterable[FoundPlugin] | None = None) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.enabled: dict[str, LoadedPlugin] = {}
        self.blocked: set[str] = set()
        self.failures: dict[str, PluginError] = {}
        self._loaded: dict[str, LoadedPlugin] = {}
        self._found: dict[str, list[FoundPlugin]] = defaultdict(list)
        for plugin in find_plugins() if found is None else found:
            self._found[plugin.key].append(plugin)

    @property
    def found(self) -> list[FoundPlugin]:
        """Every plugin found, sorted by name."""
        return [plugin for _, plugins in sorted(self._found.items()) for plugin in plugins]

    def state(self, plugin: FoundPlugin) -> PluginState:
        """Tell how a plugin stands; broken only if it was tried."""
        if plugin.key in self.blocked:
            return "blocked"
        if len(self._found[plugin.key]) > 1:
            return "ambiguous"
        if plugin.key in self.failures:
            return "broken"
        return "enabled" if plugin.name in self.enabled else "installed"

    def failure(self, plugin: FoundPlugin) -> str | None:
        """Give the reason why a plugin could not be loaded, if it was tried."""
        error = self.failures.get(plugin.key)
        return str(error) if error else None

    def loaded(self, plugin: FoundPlugin) -> LoadedPlugin | None:
        """Give the plugin if it has been imported; imports nothing."""
        return self._loaded.get(plugin.key)

    def apply(self, requests: Sequence[tuple[str, str]], problems: list[Problem]) -> None:
        """Block and enable what the run names; ``requests`` are pairs of value and place.

        Blocks act first, wherever they stand: a blocked plugin is not imported.
        """
        parsed: list[tuple[PluginRequest, str]] = []
        for text, place in requests:
            try:
                parsed.append((PluginRequest.parse(text), place))
            except ValueError as error:
                problems.append(Problem(place=place, message=str(error)))
        for request, place in parsed:
            if request.blocks:
                if canonical(request.name) not in self._found:
                    problems.append(Problem(place=place, message=self._unknown(request.name)))
                self.blocked.add(canonical(request.name))
        if BUILTIN not in self.blocked:
            parsed.insert(0, (PluginRequest(BUILTIN), "built-in plugin"))
        for request, place in parsed:
            if canonical(request.plugin_name) not in self.blocked:
                try:
                    self._enable_request(request)
                except PluginError as error:
                    problems.append(Problem(place=place, message=str(error)))

    def enable(self, name: str) -> LoadedPlugin:
        """Load the plugin of this name, if need be, and register its hooks.

        Raises:
            PluginError: If there is none, more than one, or it is blocked or broken.
        """
        plugin = self.load(name)
        if plugin.name not in self.enabled:
            self._register(plugin)
            logging.getLogger(plugin.module.partition(".")[0]).setLevel(logging.INFO)
        return plugin

    def add(self, plugin: LoadedPlugin) -> None:
        """Enable a plugin that this process made itself and that is installed nowhere.

        An installed one of the same name cannot be used beside it.
        """
        self._found[plugin.found.key] = [plugin.found]
        self._loaded[plugin.found.key] = plugin
        self._register(plugin)

    def _register(self, plugin: LoadedPlugin) -> None:
        for text in registered(self.manager, plugin.implementations, plugin.name):
            logger.warning("plugin %s: %s", plugin.found, text)
        self.enabled[plugin.name] = plugin

    def load(self, name: str) -> LoadedPlugin:
        """Import and validate a plugin without enabling it.

        Raises:
            PluginError: As for :meth:`enable`.
        """
        key = canonical(name)
        if key in self.blocked:
            raise PluginError(f"plugin '{name}' is blocked by no:{name}")
        if key in self.failures:
            raise self.failures[key]
        if key not in self._loaded:
            try:
                self._loaded[key] = load_plugin(self._single(name))
            except PluginError as error:
                if key in self._found:
                    self.failures[key] = error
                raise
        return self._loaded[key]

    def load_rest(self) -> list[LoadedPlugin]:
        """Load every installed plugin that is neither enabled nor blocked.

        Those that cannot be loaded are left out, each with one warning.
        """
        known = self.blocked | self.failures.keys() | {canonical(name) for name in self.enabled}
        rest = []
        for key in sorted(self._found.keys() - known):
            try:
                rest.append(self.load(key))
            except PluginError as error:
                logger.warning("%s; it is left out", error)
        return rest

    def _enable_request(self, request: PluginRequest) -> None:
        if request.is_file:
            self._add_file(request.name)
        plugin = self._single(request.plugin_name)
        if not _fits(plugin.version, request.specifier):
            raise PluginError(
                f"plugin '{plugin.name}': installed is {plugin.source}, "
                f"the run wants {request.specifier}"
            )
        self.enable(plugin.name)

    def _add_file(self, name: str) -> None:
        plugin = found_file(Path(name).expanduser())
        same_name = self._found[plugin.key]
        if not any(_is_same_file(plugin, other) for other in same_name):
            same_name.append(plugin)

    def _single(self, name: str) -> FoundPlugin:
        candidates = self._found.get(canonical(name), [])
        if not candidates:
            raise PluginError(self._unknown(name))
        if len(candidates) > 1:
            listed = " and ".join(plugin.source for plugin in candidates)
            raise PluginError(
                f"more than one plugin is called '{name}': {listed}; uninstall or rename all but "
                f"one"
            )
        return candidates[0]

    def _unknown(self, name: str) -> str:
        for plugin in self.found:
            if canonical(plugin.distribution) == canonical(name):
                return f"no plugin '{name}' is installed; the plugin of {name} is '{plugin.name}'"
        hint = suggestion(name, [plugin.name for plugin in self.found])
        return f"no plugin '{name}' is installed; {hint or 'see `sdxl-train plugins`'}"


def _fits(version: str, specifier: SpecifierSet) -> bool:
    if not specifier:
        return True
    try:
        return specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def _is_same_file(one: FoundPlugin, other: FoundPlugin) -> bool:
    return other.entry_point is None and Path(one.target).samefile(other.target)
