"""``--help``: every flag under what owns it. Imports no torch."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from sdxl_train.config import CORE_OPTIONS
from sdxl_train.options import Option, options_of
from sdxl_train.registry import KIND_BY_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from sdxl_train.cli.invocation import Invocation

_USAGE = """\
usage: sdxl-train --pretrained_model_name_or_path MODEL --train_data_dir DIR --output_dir DIR ...
       sdxl-train COMMAND [--help]

Trains LoRA-family networks. Flags, dataset files and file names are those of sd-scripts.
`sdxl-train --help` lists every flag, `sdxl-train demo` shows a whole run without any input."""


def show_usage() -> None:
    """Print how to start."""
    print(_USAGE)


def show_help(
    command: str | None,
    invocation: Invocation,
    core_commands: Mapping[str, Callable[[Invocation], int]],
) -> int:
    """Print the help of training, or of one command."""
    if command in core_commands and command != "plan":
        module = __import__(f"sdxl_train.cli.{command}", fromlist=["__doc__"])
        print(module.__doc__.strip())
        return 0
    if command is not None and command != "plan":
        entry = invocation.find_command(command, list(core_commands))
        positional = " ".join(f"[{name.upper()}]" for name in getattr(entry.component, "positional"))
        print(f"usage: sdxl-train {entry.name} {positional} [options]\n")
        print(textwrap.dedent(entry.component.__doc__ or "").strip())
        _print_options("options", entry.flags.values())
        return 0
    registry = invocation.enable_plugins()
    print(_USAGE)
    commands = [*core_commands, *(e.name for e in registry.entries(KIND_BY_NAME["command"]))]
    print(f"\ncommands: {', '.join(commands)}")
    for model in CORE_OPTIONS:
        _print_options((model.__doc__ or "").strip().partition("\n")[0], options_of(model).values())
    for entries in _by_component(registry.all_entries()):
        entry = entries[0]
        if entry.kind.selector and (entry.flags or entry.args):
            names = ", ".join(entry.name for entry in entries)
            mark = ", the default" if entry.component.default else ""
            title = f"{entry.kind.name} {names} (plugin {entry.plugin}{mark})"
            _print_options(title, entry.flags.values())
            for option in entry.args.values():
                _print_option(f"--{entry.kind.args} {option.name}=", option)
    return 0


def _by_component(entries: Iterable[object]) -> list[list[object]]:
    grouped: dict[int, list[object]] = {}
    for entry in entries:
        grouped.setdefault(id(entry.component), []).append(entry)  # type: ignore[attr-defined]
    return list(grouped.values())


def _print_options(title: str, options: Iterable[Option]) -> None:
    print(f"\n{title}")
    for option in options:
        _print_option(option.flag, option)


def _print_option(written: str, option: Option) -> None:
    expected = "" if option.is_switch and not option.default else f" {option.expected}"
    print(f"  {written}{expected}")
    text = option.help
    if option.required:
        text += " Required."
    elif option.default not in (None, False, []):
        text += f" Default: {option.default}."
    print(textwrap.fill(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6))
