"""``sdxl-train components``: what there is to choose from."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

from sdxl_train.cli.console import warn
from sdxl_train.cli.curves import plot
from sdxl_train.cli.help import by_component, component_lines
from sdxl_train.cli.invocation import CoreCommand
from sdxl_train.cli.schema import documents
from sdxl_train.components import KINDS
from sdxl_train.errors import PluginError, UserError
from sdxl_train.options import suggestion
from sdxl_train.registry import KIND_BY_NAME

if TYPE_CHECKING:
    from sdxl_train.cli.invocation import Invocation
    from sdxl_train.registry import Entry, Registry

_SUMMARY = "List the components of the enabled plugins, with their options."
_USAGE = f"""\
usage: sdxl-train components [KIND[:NAME] ...] [--plugin NAME] [--json]
       sdxl-train components --schema [--plugin NAME]
       sdxl-train components scheduler:NAME --plot [FILE.png] [--max_train_steps N] [OPTION ...]

{_SUMMARY}

  KIND            {", ".join(kind.name for kind in KINDS)}
  KIND:NAME       one component with its options; NAME may be PLUGIN:NAME
  --plugin NAME   enable it first, as a run would
  --json          a list of objects: kind, name, plugin, default, chosen_by, description, options
  --schema        JSON schemas of a file of options and of a dataset file, with the options of
                  every installed plugin; `sdxl-train schema --write` places them for editors
  --plot          the learning rate at each step, in the terminal or into a PNG, with the
                  schedule's own flags, --lr_scheduler_args, --learning_rate"""


def run(invocation: Invocation) -> int:
    """List components; one that is named is shown with its options."""
    as_json = invocation.take_switch("json")
    as_schema = invocation.take_switch("schema")
    as_plot = "plot" in invocation.settings
    if as_plot and (as_json or as_schema):
        raise UserError.of("--plot", "draws a curve", "leave out --json and --schema")
    if not as_plot:
        invocation.refuse_flags("components", ["json", "schema", "plot"])
    registry = invocation.registry()
    warn(invocation.notices)
    words = invocation.words
    if as_schema:
        if words or as_json:
            raise UserError.of("--schema", "covers everything", "leave out names and --json")
        print(json.dumps(documents(registry), indent=2))
        return 0
    entries = [entry for word in words or [""] for entry in _selected(registry, word)]
    if as_plot:
        plot(invocation, registry, entries if words else [])
    elif as_json:
        print(json.dumps([_describe(entry) for entry in entries], indent=2, default=str))
    else:
        print("\n".join(_listing(entries, in_full=any(":" in word for word in words))))
    return 0


COMMAND = CoreCommand(run=run, summary=_SUMMARY, usage=_USAGE)


def _selected(registry: Registry, word: str) -> list[Entry]:
    kind_name, colon, name = word.partition(":")
    if not word:
        return list(registry.all_entries())
    kind = KIND_BY_NAME.get(kind_name)
    if kind is None:
        raise UserError.of(
            "sdxl-train components",
            f"no kind is called '{kind_name}'",
            suggestion(kind_name, [kind.name for kind in KINDS]),
        )
    if not colon:
        return registry.entries(kind)
    try:
        return [registry.find(kind, name)]
    except PluginError as error:
        raise UserError.of("sdxl-train components", str(error)) from None


def _describe(entry: Entry) -> dict[str, Any]:
    return {
        "kind": entry.kind.name,
        "name": entry.name,
        "plugin": entry.plugin,
        "default": entry.component.default,
        "chosen_by": _chosen_by(entry),
        "description": inspect.cleandoc(entry.component.__doc__ or ""),
        "options": [
            {
                "name": option.name,
                "flag": option.flag,
                "expects": option.expected,
                "required": option.required,
                "default": option.default,
                "description": option.help,
            }
            for option in (*entry.flags.values(), *entry.args.values())
        ],
    }


def _chosen_by(entry: Entry) -> str:
    return f"--{entry.kind.selector}" if entry.kind.selector else f"sdxl-train {entry.name}"


def _listing(entries: list[Entry], *, in_full: bool) -> list[str]:
    lines: list[str] = []
    kind = ""
    for names, entry in by_component(entries):
        if entry.kind.name != kind:
            kind = entry.kind.name
            lines.append(f"{kind} ({_chosen_by(entry)})" if entry.kind.selector else kind)
        lines += component_lines(names, entry, in_full=in_full)
    return lines
