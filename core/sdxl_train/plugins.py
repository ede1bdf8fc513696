"""Find plugins, load and validate each in isolation, register the ones that the run names.

Found -> loaded -> enabled are three states on purpose. Finding reads metadata only. Loading imports
one plugin and says everything that is wrong with it, with the distribution's name. Enabling puts it
on the pluggy manager. One broken plugin never keeps another from working.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from sdxl_train import hookspecs
from sdxl_train.components import KINDS, Component, Kind
from sdxl_train.errors import Problem, SdxlTrainError
from sdxl_train.options import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

logger = logging.getLogger(__name__)

BUILTIN = "sdxl-lora"
"""The plugin that is on unless blocked. It is found like every other, by its entry point."""


class PluginError(SdxlTrainError):
    """A plugin cannot be used; the message says which, of what distribution, and why."""


@dataclass(frozen=True, kw_only=True)
class FoundPlugin:
    """A plugin that is installed or was named by its file; nothing of it is imported yet.

    Attributes:
        name: Name of the entry point, or of the file.
        distribution: The installed distribution; empty for a file.
        version: Its version; empty for a file.
        target: What to import: the entry point's value, or the file's path.
        entry_point: The entry point; None for a file.
    """

    name: str
    distribution: str
    version: str
    target: str
    entry_point: importlib.metadata.EntryPoint | None = None

    def __str__(self) -> str:
        """Name the plugin as messages do: ``'lycoris' (sdxl-train-lycoris 0.1.0)``."""
        source = f"{self.distribution} {self.version}" if self.distribution else self.target
        return f"'{self.name}' ({source})"


class _Impls:
    """The hook implementations of one plugin, as an object with the identity pluggy relies on.

    Registered in the place of the plugin itself: pluggy compares and hashes what it is given, and
    a plugin object may define ``__eq__`` (every dataclass does).
    """


@dataclass(frozen=True, kw_only=True)
class LoadedPlugin:
    """A plugin that is imported and valid.

    Attributes:
        found: Where it came from.
        package: Name of the module that defines it; frames of it and below are blamed on it.
        components: What it provides, by kind name and component name, in its own order.
    """

    found: FoundPlugin
    package: str
    impls: _Impls
    components: Mapping[str, Mapping[str, type[Component]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The plugin's name."""
        return self.found.name


def find_plugins() -> list[FoundPlugin]:
    """Give every installed plugin, sorted by name and distribution. Imports none of them."""
    found = [
        FoundPlugin(
            name=entry_point.name,
            distribution=entry_point.dist.name if entry_point.dist else "",
            version=entry_point.dist.version if entry_point.dist else "",
            target=entry_point.value,
            entry_point=entry_point,
        )
        for entry_point in importlib.metadata.entry_points(group=hookspecs.PROJECT)
    ]
    # The file system decides the order of entry points; a run must not depend on it.
    return sorted(found, key=lambda plugin: (plugin.name, plugin.distribution))


@dataclass(frozen=True)
class PluginRequest:
    """One value of ``--plugin``: a name with an optional version range, a file, or a block."""

    name: str
    specifier: SpecifierSet = field(default_factory=SpecifierSet)
    blocks: bool = False
    is_file: bool = False

    _PATTERN = re.compile(r"([A-Za-z0-9._-]*[A-Za-z0-9])\s*([<>=!~].*)?")

    @classmethod
    def parse(cls, text: str) -> PluginRequest:
        """Read ``lycoris``, ``lycoris>=0.2``, ``no:lycoris`` or ``./my_hooks.py``.

        Raises:
            ValueError: If the text is none of these.
        """
        text = text.strip()
        if text.endswith(".py") or "/" in text or "\\" in text:
            return cls(text, is_file=True)
        blocks = text.startswith("no:")
        match = cls._PATTERN.fullmatch(text.removeprefix("no:").strip())
        if not match:
            raise ValueError(f"{text!r} is not a plugin name, a .py file or no:NAME")
        try:
            specifier = SpecifierSet(match[2] or "")
        except InvalidSpecifier:
            raise ValueError(f"{match[2]!r} is not a version range such as >=0.2") from None
        return cls(match[1], specifier, blocks)


class PluginHost:
    """All plugins of a process: which are there, which are on, and why one is not."""

    def __init__(self, found: Iterable[FoundPlugin] | None = None) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.enabled: dict[str, LoadedPlugin] = {}
        self.blocked: set[str] = set()
        self.failures: dict[str, PluginError] = {}
        self._loaded: dict[str, LoadedPlugin] = {}
        self._found: dict[str, list[FoundPlugin]] = defaultdict(list)
        for plugin in find_plugins() if found is None else found:
            self._found[_canonical(plugin.name)].append(plugin)

    @property
    def found(self) -> list[FoundPlugin]:
        """Every plugin found, sorted by name."""
        return [plugin for _, plugins in sorted(self._found.items()) for plugin in plugins]

    def apply(
        self, requests: Sequence[tuple[str, str]], problems: list[Problem]
    ) -> list[LoadedPlugin]:
        """Block and enable what the run names; ``requests`` are pairs of value and place.

        Blocks act first, wherever they stand: a blocked plugin must not be imported.
        """
        parsed: list[tuple[PluginRequest, str]] = []
        for text, place in requests:
            try:
                parsed.append((PluginRequest.parse(text), place))
            except ValueError as error:
                problems.append(Problem(place=place, message=str(error)))
        for request, place in parsed:
            if request.blocks:
                if _canonical(request.name) not in self._found:
                    problems.append(self._unknown(request.name, place))
                self.blocked.add(_canonical(request.name))
        if BUILTIN not in self.blocked:
            parsed.insert(0, (PluginRequest(BUILTIN), "built-in plugin"))
        loaded = []
        for request, place in parsed:
            if not request.blocks:
                try:
                    loaded.append(self._enable_request(request))
                except PluginError as error:
                    problems.append(Problem(place=place, message=str(error)))
        return loaded

    def enable(self, name: str) -> LoadedPlugin:
        """Load the plugin of this name, if need be, and register its hooks.

        Raises:
            PluginError: If there is none, more than one, or it is blocked or broken.
        """
        plugin = self.load(name)
        if plugin.name not in self.enabled:
            self.manager.register(plugin.impls, name=plugin.name)
            self.enabled[plugin.name] = plugin
        return plugin

    def load(self, name: str) -> LoadedPlugin:
        """Import and validate a plugin without enabling it.

        Raises:
            PluginError: As for :meth:`enable`.
        """
        key = _canonical(name)
        if key in self.blocked:
            raise PluginError(f"plugin '{name}' is blocked by no:{name}")
        if key in self.failures:
            raise self.failures[key]
        if key not in self._loaded:
            try:
                self._loaded[key] = _load(self._single(name))
            except PluginError as error:
                self.failures[key] = error
                raise
        return self._loaded[key]

    def loaded(self, name: str) -> LoadedPlugin | None:
        """Give the plugin if it has been imported; imports nothing."""
        return self._loaded.get(_canonical(name))

    def load_rest(self) -> list[LoadedPlugin]:
        """Load every installed plugin that is neither enabled nor blocked; skip the broken ones.

        Each broken one is one warning.
        """
        rest = []
        for key in sorted(self._found):
            if key in self.blocked or key in {_canonical(name) for name in self.enabled}:
                continue
            known_broken = key in self.failures
            try:
                rest.append(self.load(key))
            except PluginError as error:
                if not known_broken:
                    logger.warning("%s; it is left out", error)
        return rest

    def _enable_request(self, request: PluginRequest) -> LoadedPlugin:
        if request.is_file:
            found = _found_file(request.name)
            self._found[_canonical(found.name)] = [found]
            return self.enable(found.name)
        found = self._single(request.name)
        if not request.specifier.contains(found.version, prereleases=True):
            raise PluginError(
                f"plugin '{found.name}': installed is {found.distribution} {found.version}, "
                f"the run wants {request.specifier}"
            )
        return self.enable(request.name)

    def _single(self, name: str) -> FoundPlugin:
        candidates = self._found.get(_canonical(name), [])
        if not candidates:
            raise PluginError(self._unknown(name, "").message)
        if len(candidates) > 1:
            listed = ", ".join(f"{p.distribution} {p.version}" for p in candidates)
            raise PluginError(
                f"plugin '{name}' is registered by more than one distribution ({listed}): "
                f"uninstall all but one"
            )
        return candidates[0]

    def _unknown(self, name: str, place: str) -> Problem:
        names = [plugin.name for plugin in self.found]
        hint = suggestion(name, names) or "see `sdxl-train plugins`"
        return Problem(place=place, message=f"no plugin '{name}' is installed; {hint}")


def _canonical(name: str) -> str:
    return name.replace("_", "-").replace(".", "-").lower()


def _found_file(text: str) -> FoundPlugin:
    path = Path(text).expanduser()
    if not path.is_file():
        raise PluginError(f"plugin file {text} does not exist")
    return FoundPlugin(
        name=path.stem.replace("_", "-"), distribution="", version="", target=str(path)
    )


def _load(found: FoundPlugin) -> LoadedPlugin:
    try:
        plugin = _import(found)
    except (Exception, SystemExit) as error:
        # A plugin may fail in any way; whoever named it must learn which one and why.
        raise PluginError(
            f"plugin {found} does not load (entry point {found.name} = {found.target}): "
            f"{type(error).__name__}: {error}"
        ) from error
    impls = _Impls()
    for name, function in _hook_functions(plugin, found):
        setattr(impls, name, function)
    package = plugin.__name__ if inspect.ismodule(plugin) else type(plugin).__module__
    return LoadedPlugin(
        found=found, package=package, impls=impls, components=_collect(impls, found)
    )


def _import(found: FoundPlugin) -> Any:
    if found.entry_point is not None:
        return found.entry_point.load()
    # A name of its own keeps the file from shadowing, or being shadowed by, an installed module.
    name = f"sdxl_train_file_plugin_{Path(found.target).stem}"
    spec = importlib.util.spec_from_file_location(name, found.target)
    if spec is None or spec.loader is None:
        raise ImportError(f"{found.target} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


_HOOKS: dict[str, inspect.Signature] = {
    name: inspect.signature(function)
    for name, function in vars(hookspecs).items()
    if hasattr(function, f"{hookspecs.PROJECT}_spec")
}


def _hook_functions(plugin: Any, found: FoundPlugin) -> list[tuple[str, Any]]:
    """Give the marked functions of a plugin, refusing all that pluggy would pass in silence."""
    functions = []
    for name in dir(plugin):
        function = inspect.getattr_static(plugin, name, None)
        options = getattr(function, f"{hookspecs.PROJECT}_impl", None)
        if options is None:
            if name in _HOOKS and callable(function):
                raise PluginError(
                    f"plugin {found}: {name} has the name of a hook but no @hookimpl before it"
                )
            continue
        _check_hook(options.get("specname") or name, name, function, options, found)
        functions.append((name, getattr(plugin, name)))
    return functions


def _check_hook(
    hook: str, name: str, function: Any, options: Mapping[str, Any], found: FoundPlugin
) -> None:
    if hook not in _HOOKS:
        hint = suggestion(hook, list(_HOOKS)) or f"hooks are {', '.join(_HOOKS)}"
        raise PluginError(f"plugin {found}: there is no hook '{hook}'; {hint}")
    if options.get("wrapper") or options.get("hookwrapper"):
        raise PluginError(f"plugin {found}: {name} is a hook wrapper; hooks here have none")
    allowed = set(_HOOKS[hook].parameters)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.default is not parameter.empty:
            raise PluginError(
                f"plugin {found}: argument '{parameter.name}' of {name} has a default and would "
                f"never be passed; remove the default"
            )
        if parameter.name not in allowed:
            offered = f"it offers {', '.join(sorted(allowed))}" if allowed else "it offers none"
            raise PluginError(
                f"plugin {found}: hook {hook} has no argument '{parameter.name}'; {offered}"
            )


def _collect(impls: _Impls, found: FoundPlugin) -> dict[str, dict[str, type[Component]]]:
    """Ask a plugin once what it provides. Its own manager attributes the answers to it."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(impls)
    provided: dict[str, dict[str, type[Component]]] = {}
    for kind in KINDS:
        try:
            answers = getattr(manager.hook, kind.hook)()
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"plugin {found}: {kind.hook} failed: {type(error).__name__}: {error}"
            ) from error
        for answer in answers:
            provided.setdefault(kind.name, {}).update(_checked(answer, kind, found))
    return provided


def _checked(answer: object, kind: Kind, found: FoundPlugin) -> Mapping[str, type[Component]]:
    wanted = f"a dict of name -> subclass of {kind.base.__name__}"
    if not isinstance(answer, Mapping):
        raise PluginError(
            f"plugin {found}: {kind.hook} returned {type(answer).__name__}, expected {wanted}"
        )
    for name, component in answer.items():
        is_component = isinstance(component, type) and issubclass(component, kind.base)
        if not isinstance(name, str) or not name or not is_component:
            raise PluginError(
                f"plugin {found}: {kind.hook} returned {name!r}: {component!r}, expected {wanted}"
            )
        if inspect.isabstract(component):
            raise PluginError(
                f"plugin {found}: {component.__name__} lacks {_missing_methods(component)}"
            )
    return answer


def _missing_methods(component: type[Component]) -> str:
    return ", ".join(sorted(getattr(component, "__abstractmethods__", ())))
