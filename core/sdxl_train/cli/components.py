"""``sdxl-train components [KIND[:NAME]] [--json] [--schema]``: what there is to choose from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sdxl_train.components import KINDS
from sdxl_train.errors import UserError
from sdxl_train.options import suggestion
from sdxl_train.plugins import PluginError
from sdxl_train.registry import KIND_BY_NAME

if TYPE_CHECKING:
    from sdxl_train.cli.invocation import Invocation
    from sdxl_train.registry import Entry, Registry


def run(invocation: Invocation) -> int:
    """List components; one that is named is shown with its options."""
    as_json = invocation.take_switch("json")
    as_schema = invocation.take_switch("schema")
    settings = sorted(set(invocation.settings) - {"plugin", "config_file"})
    if settings:
        raise UserError.of(f"--{settings[0]}", "is no option of sdxl-train components")
    registry = invocation.enable_plugins()
    words = [str(word.value) for word in invocation.leading]
    entries = [entry for word in words or [""] for entry in _selected(registry, word)]
    if as_schema:
        print(json.dumps({e.qualified: e.component.model_json_schema() for e in entries}, indent=2))
    elif as_json:
        print(json.dumps([_describe(entry) for entry in entries], indent=2, default=str))
    else:
        in_full = any(":" in word for word in words)
        _print_entries(entries, in_full=in_full)
    return 0


def _selected(registry: Registry, word: str) -> list[Entry]:
    kind_name, _, name = word.partition(":")
    if not kind_name:
        return list(registry.all_entries())
    kind = KIND_BY_NAME.get(kind_name)
    if kind is None:
        raise UserError.of(
            "sdxl-train components",
            f"no kind is called '{kind_name}'",
            suggestion(kind_name, [kind.name for kind in KINDS]),
        )
    if not name:
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
        "chosen_by": f"--{entry.kind.selector}" if entry.kind.selector else "command",
        "description": _first_line(entry.component.__doc__),
        "options": [
            {
                "name": option.name,
                "given_as": f"--{option.name}"
                if option.name in entry.flags
                else f"--{entry.kind.args} {option.name}=",
                "expects": option.expected,
                "required": option.required,
                "default": option.default,
                "description": option.help,
            }
            for option in (*entry.flags.values(), *entry.args.values())
        ],
    }


def _print_entries(entries: list[Entry], *, in_full: bool) -> None:
    kind = ""
    for entry in entries:
        if entry.kind.name != kind:
            kind = entry.kind.name
            chosen = f"--{entry.kind.selector}" if entry.kind.selector else "sdxl-train NAME"
            print(f"{kind} ({chosen})")
        mark = "*" if entry.component.default else " "
        print(f" {mark} {entry.name:<24} {_first_line(entry.component.__doc__)} [{entry.plugin}]")
        if in_full:
            for option in _describe(entry)["options"]:
                default = "required" if option["required"] else f"default {option['default']}"
                print(f"     {option['given_as']}  {option['expects']}, {default}")
                print(f"         {option['description']}")


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
