"""``sdxl-train plugins``: what is installed, enabled, provided, broken."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sdxl_train.cli.console import warn
from sdxl_train.cli.help import wrapped
from sdxl_train.cli.invocation import CoreCommand
from sdxl_train.errors import PluginError, UserError
from sdxl_train.loading import canonical
from sdxl_train.plugins import BUILTIN

if TYPE_CHECKING:
    from sdxl_train.cli.invocation import Invocation
    from sdxl_train.plugins import FoundPlugin, PluginHost

_SUMMARY = "List the plugins: installed, enabled, provided, broken."
_USAGE = f"""\
usage: sdxl-train plugins [NAME ...] [--plugin NAME] [--json]

{_SUMMARY}

The list reads metadata and imports only what is enabled: the built-in plugin, and what --plugin
names. A plugin that is named is imported, and says what it provides or why it does not load.

  --plugin NAME   enable it first, as a run would; no:NAME blocks it
  --json          a list of objects: name, state, distribution, version, entry_point, built_in,
                  provides (null where not imported) and error"""


def run(invocation: Invocation) -> int:
    """List the plugins, or describe the named ones."""
    as_json = invocation.take_switch("json")
    invocation.refuse_flags("plugins", ["json"])
    problems = invocation.enable_plugins()
    warn(invocation.notices)
    host = invocation.host
    rows = [_describe(host, plugin) for plugin in _selected(host, invocation.words)]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            _print_row(row)
    if problems:
        raise UserError(problems)
    return 0


COMMAND = CoreCommand(run=run, summary=_SUMMARY, usage=_USAGE)


def _selected(host: PluginHost, names: list[str]) -> list[FoundPlugin]:
    keys = {canonical(name) for name in names}
    selected = [plugin for plugin in host.found if not names or plugin.key in keys]
    for name in names:
        try:
            host.load(name)
        except PluginError as error:
            # Of a plugin that is there, its row says what is wrong.
            if canonical(name) not in {plugin.key for plugin in selected}:
                raise UserError.of("sdxl-train plugins", str(error)) from None
    return selected


def _describe(host: PluginHost, plugin: FoundPlugin) -> dict[str, Any]:
    loaded = host.loaded(plugin)
    provides = None
    if loaded is not None:
        provides = {kind: list(components) for kind, components in loaded.components.items()}
    return {
        "name": plugin.name,
        "state": host.state(plugin),
        "distribution": plugin.distribution,
        "version": plugin.version,
        "entry_point": plugin.target,
        "built_in": plugin.name == BUILTIN,
        "provides": provides,
        "error": host.failure(plugin),
    }


def _print_row(row: dict[str, Any]) -> None:
    source = f"{row['distribution']} {row['version']}".strip() or row["entry_point"]
    print(f"{row['name']:<24} {row['state']:<10} {source}")
    if row["error"]:
        print(f"    {row['error']}")
    elif row["provides"] is None:
        print(f"    not imported; `sdxl-train plugins {row['name']}` asks it what it provides")
    for kind, names in (row["provides"] or {}).items():
        print("\n".join(wrapped(f"{kind}: {', '.join(names)}", "    ")))
