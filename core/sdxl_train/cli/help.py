"""``--help``: every flag under what owns it. Imports no torch."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from typing import TYPE_CHECKING

from sdxl_train.components import KINDS, Command, TrainingCommand
from sdxl_train.config import CORE_OPTIONS
from sdxl_train.options import options_of
from sdxl_train.registry import KIND_BY_NAME
from sdxl_train.wording import bounds, placeholder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from sdxl_train.cli.invocation import CoreCommand
    from sdxl_train.components import Kind, OptionModel
    from sdxl_train.options import Option
    from sdxl_train.registry import Entry, Registry

USAGE = """\
usage: sdxl-train --pretrained_model_name_or_path MODEL --train_data_dir DIR --output_dir DIR ...
       sdxl-train COMMAND [--help]

Trains LoRA-family networks.
Flags, dataset files and file names are those of sd-scripts."""

HINT = """\
`sdxl-train --help` lists every flag, `sdxl-train demo` shows a whole run without any input."""

_LONG_CHOICE = 50
"""A choice of more characters stands behind the help, where lines break."""
_COLUMN = 34
"""Where descriptions begin."""

_HARD_SPACE = "\N{NO-BREAK SPACE}"


def training_help(registry: Registry, core_commands: Mapping[str, CoreCommand]) -> str:
    """Give the help of training: what every flag does, under its owner."""
    lines = [USAGE, "", "Commands (sdxl-train COMMAND --help says more)"]
    for name, command in core_commands.items():
        lines += _row(name, command.summary)
    for names, entry in by_component(registry.entries(KIND_BY_NAME["command"])):
        lines += _row(", ".join(names), _first_line(entry.component))
    offered = {kind.selector: _choices(registry, kind) for kind in KINDS if kind.selector}
    for model in CORE_OPTIONS:
        lines += ["", *wrapped(_first_line(model).rstrip("."), "")]
        for option in options_of(model).values():
            lines += _option_rows(option, offered.get(option.name, ""))
    for kind in KINDS:
        if kind.selector:
            lines += _kind_section(kind, registry)
    return "\n".join(lines)


def command_help(entry: Entry) -> str:
    """Give the help of a command that a plugin registers."""
    command = entry.component
    assert issubclass(command, Command)
    positional = "".join(f" [{name.upper()}]" for name in command.positional)
    lines = [f"usage: sdxl-train {entry.name}{positional} [options]", ""]
    lines.append(inspect.cleandoc(command.__doc__ or ""))
    if entry.flags:
        lines += ["", "options"]
    for option in entry.flags.values():
        lines += _option_rows(option)
    if issubclass(command, TrainingCommand):
        lines += ["", "and the flags of training: see `sdxl-train --help`"]
    return "\n".join(lines)


def component_lines(names: list[str], entry: Entry, *, in_full: bool) -> list[str]:
    """Give a component in a line, or with all that it says of itself and its options."""
    mark = ", the default" if entry.component.default else ""
    lines = _row(", ".join(names), f"{_first_line(entry.component)} [{entry.plugin}{mark}]")
    if in_full:
        rest = inspect.cleandoc(entry.component.__doc__ or "").partition("\n")[2].strip()
        lines += ["", *textwrap.indent(rest, "    ").split("\n")] if rest else []
        lines.append("")
        for option in (*entry.flags.values(), *entry.args.values()):
            lines += _option_rows(option)
    return lines


def _kind_section(kind: Kind, registry: Registry) -> Iterator[str]:
    """Give the options of a kind, once, and under each component its own."""
    yield ""
    yield from wrapped(f"{_first_line(kind.base).rstrip('.')} (--{kind.selector})", "")
    shared = kind.base.model_fields
    for option in options_of(kind.base).values():
        yield from _option_rows(option)
    for names, entry in by_component(registry.entries(kind)):
        yield from wrapped(
            f"{', '.join(names)} [plugin {entry.plugin}]: {_first_line(entry.component)}", "  * "
        )
        for name, option in options_of(entry.component).items():
            # What a component says anew about an option of its kind is worth repeating.
            if name not in shared or repr(option.field) != repr(shared[name]):
                yield from _option_rows(option)


def by_component(entries: Iterable[Entry]) -> Iterator[tuple[list[str], Entry]]:
    """Put the names together that a plugin gives to one component."""
    grouped: dict[tuple[str, type[OptionModel]], list[Entry]] = {}
    for entry in entries:
        grouped.setdefault((entry.plugin, entry.component), []).append(entry)
    for same in grouped.values():
        yield [entry.name for entry in same], same[0]


def _choices(registry: Registry, kind: Kind) -> str:
    default = registry.default(kind)
    names = ", ".join(entry.name for entry in registry.entries(kind))
    return f"{names}; default {default.name}" if default and not kind.stacked else names


def _option_rows(option: Option, names: str = "") -> list[str]:
    """Give the lines of an option; ``names`` are the components that it chooses from."""
    value = "NAME" if names else placeholder(option.schema)
    if len(value) > _LONG_CHOICE:
        names, value = value.replace("|", ", "), "NAME"
    if option.args:
        written = f"{option.flag}={value}"
    elif option.is_switch and not option.default:
        written = option.flag
    else:
        written = f"{option.flag} {value}"
    facts = [names] if names else [_unbroken(fact) for fact in _facts(option)]
    return _row(written, f"{option.help} [{', '.join(facts)}]" if facts else option.help)


def _facts(option: Option) -> Iterator[str]:
    limits = bounds(option.schema)
    # That a count is not negative goes without saying.
    if "<" in limits or "> " in limits:
        yield limits
    default = option.default
    if option.required:
        yield "required"
    elif default not in (None, False, "", []):
        is_sequence = isinstance(default, (list, tuple))
        shown = ",".join(str(item) for item in default) if is_sequence else str(default)
        yield f"default {shown.lower() if isinstance(default, bool) else shown}"


def _unbroken(text: str) -> str:
    return text.replace(" ", _HARD_SPACE)


def _row(left: str, right: str) -> list[str]:
    """Set a line in two columns, argparse's way."""
    lines = wrapped(right, " " * _COLUMN)
    left = f"  {left}"
    if len(left) > _COLUMN - 2:
        return [left, *lines]
    return [f"{left:<{_COLUMN}}{lines[0].strip()}", *lines[1:]] if lines else [left]


def wrapped(text: str, indent: str) -> list[str]:
    """Give a text in lines that fit the terminal, between 80 and 100 columns."""
    width = min(max(shutil.get_terminal_size().columns, 80), 100)
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=" " * len(indent),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_HARD_SPACE, " ") for line in lines]


def _first_line(model: type[OptionModel]) -> str:
    return inspect.cleandoc(model.__doc__ or "").partition("\n")[0]
