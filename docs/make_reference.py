"""Write ``reference.md`` and ``api.txt`` from the code: ``python docs/make_reference.py``.

A test compares both with what this would write.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sdxl_train
from sdxl_train import hookspecs, ldm, testing
from sdxl_train.components import KINDS, Component
from sdxl_train.config import CORE_OPTIONS
from sdxl_train.options import Option, options_of
from sdxl_train.plugins import PluginHost
from sdxl_train.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FOLDER = Path(__file__).parent


def reference() -> str:
    """Give the page of hooks, events, kinds and options, of the framework and its own plugin."""
    host = PluginHost()
    host.apply([], [])
    lines = [
        "# Reference",
        "",
        "Made from the code by `docs/make_reference.py`.",
        "",
        "## Hooks",
        "",
        "Asked once, at start, and answered with components by name.",
        "",
        *_hooks(name for name in vars(hookspecs) if name not in hookspecs.EVENTS),
        "",
        "## Events",
        "",
        "Told to observers and plugins; what they return is ignored.",
        "",
        *_hooks(hookspecs.EVENTS),
        "",
        "## Options of the framework",
    ]
    for model in CORE_OPTIONS:
        lines += ["", f"### {_first_line(model).rstrip('.')}", "", *_options(options_of(model))]
    registry = Registry(host)
    for kind in KINDS:
        chosen = f" (`--{kind.selector}`)" if kind.selector else ""
        lines += ["", f"## {kind.name.capitalize()}{chosen}", "", _first_line(kind.base)]
        shared = options_of(kind.base)
        if shared:
            lines += ["", *_options(shared)]
        by_class: dict[type[Component], list[str]] = {}
        for entry in registry.entries(kind):
            by_class.setdefault(entry.component, []).append(entry.name)
        for component, names in by_class.items():
            own = {
                name: option
                for name, option in options_of(component).items()
                if shared.get(name) != option
            }
            title = ", ".join(f"`{name}`" for name in names)
            lines += ["", f"### {title}", "", _first_line(component)]
            lines += ["", *_options(own)] if own else []
    return "\n".join(lines) + "\n"


def _hooks(names: Iterable[str]) -> Iterator[str]:
    yield "| name | |"
    yield "|---|---|"
    for name in names:
        function = getattr(hookspecs, name)
        if hasattr(function, f"{hookspecs.PROJECT}_spec"):
            arguments = ", ".join(inspect.signature(function).parameters)
            yield f"| `{name}({arguments})` | {_cell(_first_line(function))} |"


def _options(options: dict[str, Option]) -> Iterator[str]:
    yield "| option | value | default | |"
    yield "|---|---|---|---|"
    for option in options.values():
        default = "required" if option.required else _default(option.default)
        yield (
            f"| `{option.flag}` | {_cell(option.expected)} | {_cell(default)} | "
            f"{_cell(option.help)} |"
        )


def _default(value: Any) -> str:
    if value is None or value == [] or value == "":
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _first_line(documented: Any) -> str:
    return inspect.cleandoc(documented.__doc__ or "").partition("\n")[0].replace("``", "`")


def _cell(text: str) -> str:
    return re.sub(r"(<[^>\s]+>)", r"`\1`", text).replace("|", "\\|")


def api() -> str:
    """Give the public names with their signatures, fields and methods, a line each."""
    lines = []
    for module in (sdxl_train, ldm, testing):
        for name in sorted(module.__all__):
            lines += _described(f"{module.__name__}.{name}", getattr(module, name))
    for name, function in vars(hookspecs).items():
        if hasattr(function, f"{hookspecs.PROJECT}_spec"):
            arguments = ", ".join(inspect.signature(function).parameters)
            lines.append(f"hook {name}({arguments})")
    return "\n".join(lines) + "\n"


def _described(name: str, value: Any) -> Iterator[str]:
    if not inspect.isclass(value):
        # What is another library's has the signature that the library gives it.
        ours = inspect.isfunction(value) and value.__module__.startswith("sdxl_train")
        signature = _signature(value) if ours else ""
        yield f"{name}{signature}"
        return
    yield f"class {name}"
    fields = getattr(value, "model_fields", None)
    if fields is not None:
        yield from (f"    {name}.{field}" for field in fields)
    elif dataclasses.is_dataclass(value):
        yield from (f"    {name}.{field.name}" for field in dataclasses.fields(value))
    for attribute, member in sorted(vars(value).items()):
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if inspect.isfunction(function) and not attribute.startswith("_"):
            yield f"    {name}.{attribute}{_signature(function)}"
        if isinstance(member, (property, cached_property)) and not attribute.startswith("_"):
            yield f"    {name}.{attribute}"
    annotations = inspect.get_annotations(value)
    known = set(fields or ()) | {
        field.name
        for field in (dataclasses.fields(value) if dataclasses.is_dataclass(value) else ())
    }
    for attribute in sorted(annotations.keys() - known):
        if not attribute.startswith("_"):
            yield f"    {name}.{attribute}"


def _signature(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    words = []
    star = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            words.append("*")
            star = True
        star = star or parameter.kind is parameter.VAR_POSITIONAL
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(
            parameter.kind, ""
        )
        optional = "" if parameter.default is parameter.empty else "=..."
        words.append(f"{prefix}{parameter.name}{optional}")
    return f"({', '.join(words)})"


PAGES = {"reference.md": reference, "api.txt": api}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (FOLDER / page).write_text(make(), encoding="utf-8")
