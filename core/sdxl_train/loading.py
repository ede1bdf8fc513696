"""One plugin, from its metadata to its components, refused for all that pluggy lets pass.

Finding reads metadata only. Loading imports the plugin and says everything that is wrong with it,
under the name of its distribution.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.parser import HeaderParser
from functools import cache
from pathlib import Path
from typing import Any

import pluggy
from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError

from sdxl_train import hookspecs
from sdxl_train._version import __version__
from sdxl_train.components import KINDS, Component, Kind
from sdxl_train.errors import PluginError
from sdxl_train.options import options_of, suggestion

_OURSELVES = "sdxl-train"


@dataclass(frozen=True, kw_only=True)
class FoundPlugin:
    """A plugin that is installed or was named by its file; nothing of it is imported yet.

    Attributes:
        name: Name of the entry point, or of the file.
        distribution: The installed distribution; empty for a file.
        version: Its version; empty for a file.
        target: What to import: the entry point's value, or the file's path.
        entry_point: The entry point; None for a file.
        requirements: What the distribution requires, as it says it.
    """

    name: str
    distribution: str
    version: str
    target: str
    entry_point: importlib.metadata.EntryPoint | None = None
    requirements: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Name the plugin as messages do: ``'lycoris' (sdxl-train-lycoris 0.1.0)``."""
        return f"'{self.name}' ({self.source})"

    @property
    def source(self) -> str:
        """Where it comes from: the distribution and its version, or the file."""
        return f"{self.distribution} {self.version}" if self.distribution else self.target

    @property
    def key(self) -> str:
        """The name as it is compared."""
        return canonical(self.name)


class Implementations:
    """The hook implementations of one plugin or observer, registered in its place.

    pluggy compares and hashes what it is given, and a plugin object may define ``__eq__`` without
    ``__hash__`` (every dataclass does).
    """


@dataclass(frozen=True, kw_only=True)
class LoadedPlugin:
    """A plugin that is imported and valid.

    Attributes:
        found: Where it came from.
        module: Name of the module that was imported.
        implementations: Its hooks.
        components: What it provides, by kind name and component name, in its own order.
    """

    found: FoundPlugin
    module: str
    implementations: Implementations
    components: Mapping[str, Mapping[str, type[Component]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The plugin's name."""
        return self.found.name


def canonical(name: str) -> str:
    """Give the form in which names of plugins are compared."""
    return name.replace("_", "-").replace(".", "-").lower()


def find_plugins() -> list[FoundPlugin]:
    """Give every installed plugin, sorted by name and distribution. Imports none of them."""
    found = []
    for entry_point in importlib.metadata.entry_points(group=hookspecs.PROJECT):
        distribution, version, requirements = _identity(entry_point.dist)
        found.append(
            FoundPlugin(
                name=entry_point.name,
                distribution=distribution,
                version=version,
                target=entry_point.value,
                entry_point=entry_point,
                requirements=requirements,
            )
        )
    # The file system decides the order of entry points; a run must not depend on it.
    return sorted(found, key=lambda plugin: (plugin.name, plugin.distribution))


def _identity(
    distribution: importlib.metadata.Distribution | None,
) -> tuple[str, str, tuple[str, ...]]:
    """Give name, version and requirements.

    Half-removed distributions have none, which is no one else's fault.
    """
    text = distribution.read_text("METADATA") if distribution else None
    headers = HeaderParser().parsestr(text or "")
    name = headers["Name"] or "a distribution without metadata"
    return name, headers["Version"] or "", tuple(headers.get_all("Requires-Dist", []))


def found_file(path: Path) -> FoundPlugin:
    """Give the plugin in a file.

    Raises:
        PluginError: If there is no such file.
    """
    if not path.is_file():
        raise PluginError(f"plugin file {path} does not exist")
    return FoundPlugin(
        name=path.stem.replace("_", "-"), distribution="", version="", target=str(path)
    )


def load_plugin(found: FoundPlugin) -> LoadedPlugin:
    """Import a plugin, check its hooks, and ask it once what it provides.

    Raises:
        PluginError: If anything is wrong with it.
    """
    fault = _version_fault(found)
    if fault:
        raise PluginError(f"plugin {found} {fault}")
    # What a plugin prints must not end up in the output of a command.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            module, plugin = _import(found)
        except (Exception, SystemExit) as error:
            # A plugin may fail in any way; whoever named it must learn which one and why.
            raise PluginError(
                f"plugin {found} does not load (entry point {found.name} = {found.target}): "
                f"{type(error).__name__}: {error}"
            ) from error
        implementations = Implementations()
        for name, function in _hooks(plugin, found):
            setattr(implementations, name, function)
        components = _components(implementations, found)
    return LoadedPlugin(
        found=found, module=module, implementations=implementations, components=components
    )


def _version_fault(found: FoundPlugin) -> str:
    """Say that a plugin is for another version of sdxl-train; empty if it is not."""
    for text in found.requirements:
        if not canonical(text).startswith(_OURSELVES):
            continue
        from packaging.requirements import InvalidRequirement, Requirement

        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            return f"requires something that cannot be read: {text!r}"
        ours = canonical(wanted.name) == _OURSELVES
        if ours and not wanted.specifier.contains(__version__, prereleases=True):
            return (
                f"is for sdxl-train {wanted.specifier}, and this is sdxl-train {__version__}: "
                f"install versions of both that fit (pip install -U {found.distribution})"
            )
    return ""


def _import(found: FoundPlugin) -> tuple[str, Any]:
    """Give the name of the imported module, and the plugin: the module or an object in it."""
    if found.entry_point is not None:
        return found.entry_point.module, found.entry_point.load()
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
    return name, module


_SIGNATURES: dict[str, inspect.Signature] = {
    name: inspect.signature(function)
    for name, function in vars(hookspecs).items()
    if hasattr(function, f"{hookspecs.PROJECT}_spec")
}


def _hooks(plugin: Any, found: FoundPlugin) -> list[tuple[str, Any]]:
    """Give the marked functions of a plugin by the names of their attributes."""
    functions = []
    for name in dir(plugin):
        function = inspect.getattr_static(plugin, name, None)
        marks = getattr(function, f"{hookspecs.PROJECT}_impl", None)
        if marks is not None:
            function = getattr(plugin, name)
            fault = _hook_fault(marks.get("specname") or name, name, function, marks)
            if fault:
                raise PluginError(f"plugin {found}: {fault}")
            functions.append((name, function))
        elif name in _SIGNATURES and callable(function):
            raise PluginError(
                f"plugin {found}: {name} has the name of a hook but no @hookimpl before it"
            )
    if not functions:
        raise PluginError(f"plugin {found}: {found.target} has no function marked with @hookimpl")
    return functions


def _hook_fault(hook: str, name: str, function: Any, marks: Mapping[str, Any]) -> str:
    if hook not in _SIGNATURES:
        if marks.get("optionalhook"):
            return ""
        hint = suggestion(hook, list(_SIGNATURES)) or f"hooks are {', '.join(_SIGNATURES)}"
        return f"there is no hook '{hook}'; {hint}"
    if marks.get("wrapper") or marks.get("hookwrapper"):
        return f"{name} is a hook wrapper, and sdxl-train's hooks take none"
    return signature_fault(hook, function)


def signature_fault(hook: str, function: Any) -> str:
    """Say what keeps a function from being called as ``hook``; empty if nothing does."""
    offered = _SIGNATURES[hook].parameters
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty:
            return (
                f"argument '{parameter.name}' of {hook} has a default and would never be passed; "
                f"remove the default"
            )
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            return f"argument '{parameter.name}' of {hook} must be a plain one: without * or /"
        if parameter.name not in offered:
            names = f"it offers {', '.join(offered)}" if offered else "it offers none"
            return f"hook {hook} has no argument '{parameter.name}'; {names}"
    return ""


def _components(
    implementations: Implementations, found: FoundPlugin
) -> dict[str, dict[str, type[Component]]]:
    """Ask a plugin what it provides. A manager of its own attributes the answers to it."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    registered(manager, implementations)
    provided: dict[str, dict[str, type[Component]]] = {}
    for kind in KINDS:
        # Not by calling the hook: pluggy drops None, which is what a forgotten return gives.
        for implementation in getattr(manager.hook, kind.hook).get_hookimpls():
            try:
                answer = implementation.function()
            except (Exception, SystemExit) as error:
                raise PluginError(
                    f"plugin {found}: {kind.hook} failed: {type(error).__name__}: {error}"
                ) from error
            provided.setdefault(kind.name, {}).update(_checked(answer, kind, found))
    return provided


def registered(
    manager: pluggy.PluginManager, implementations: Implementations, name: str | None = None
) -> list[str]:
    """Register hooks and give what pluggy warns of: hooks that are on their way out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manager.register(implementations, name=name)
    return [str(warning.message) for warning in caught]


def _checked(answer: object, kind: Kind, found: FoundPlugin) -> Mapping[str, type[Component]]:
    wanted = f"a dict of name -> subclass of {kind.base.__name__}"
    if not isinstance(answer, Mapping):
        raise PluginError(
            f"plugin {found}: {kind.hook} returned {type(answer).__name__}, expected {wanted}"
        )
    for name, component in answer.items():
        is_component = isinstance(component, type) and issubclass(component, kind.base)
        # A colon stands between plugin and component.
        if not isinstance(name, str) or not name or ":" in name or not is_component:
            raise PluginError(
                f"plugin {found}: {kind.hook} returned {name!r}: {component!r}, expected {wanted}"
            )
        fault = component_fault(component)
        if fault:
            raise PluginError(f"plugin {found}: {fault}")
    return answer


@cache
def component_fault(component: type[Component]) -> str:
    """Say what keeps a component class from being used; empty if nothing does."""
    if inspect.isabstract(component):
        return f"{component.__name__} lacks {', '.join(sorted(component.__abstractmethods__))}"
    try:
        component.model_rebuild()
        for option in options_of(component).values():
            # Help, checks and messages are all made of the schema.
            option.schema  # noqa: B018
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        reason = str(error).partition("\n")[0]
        return f"the options of {component.__name__} cannot be read: {reason}"
    return ""
