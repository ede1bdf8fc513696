"""``sdxl-train plugins [NAME] [--json]``: what is installed, enabled, provided, broken.

The list reads metadata only; naming a plugin imports it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sdxl_train.errors import UserError
from sdxl_train.plugins import BUILTIN, PluginError

if TYPE_CHECKING:
    from sdxl_train.cli.invocation import Invocation
    from sdxl_train.plugins import FoundPlugin, PluginHost


def run(invocation: Invocation) -> int:
    """List the plugins, or describe the named ones."""
    as_json = invocation.take_switch("json")
    names = [str(word.value) for word in invocation.leading]
    if not names:
        invocation.enable_plugins()
    settings = sorted(set(invocation.settings) - {"plugin", "config_file"})
    if settings:
        raise UserError.of(f"--{settings[0]}", "is no option of sdxl-train plugins")
    host = invocation.host
    rows = [_describe(host, plugin) for plugin in _selected(host, names)]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            _print_row(row)
    return 0


def _selected(host: PluginHost, names: list[str]) -> list[FoundPlugin]:
    for name in names:
        try:
            host.load(name)
        except PluginError as error:
            known = {plugin.name for plugin in host.found}
            if name not in known:
                raise UserError.of("sdxl-train plugins", str(error)) from None
    return [plugin for plugin in host.found if not names or plugin.name in names]


def _describe(host: PluginHost, plugin: FoundPlugin) -> dict[str, Any]:
    same_name = [other for other in host.found if other.name == plugin.name]
    loaded = host.loaded(plugin.name)
    failure = host.failures.get(plugin.name)
    if failure is not None:
        state = "broken"
    elif len(same_name) > 1:
        state = "ambiguous"
    elif plugin.name in host.blocked:
        state = "blocked"
    else:
        state = "enabled" if plugin.name in host.enabled else "installed"
    provided = loaded.components if loaded else None
    return {
        "name": plugin.name,
        "state": state,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "built_in": plugin.name == BUILTIN,
        "provides": (
            {kind: list(components) for kind, components in provided.items()}
            if provided is not None
            else None
        ),
        "error": str(failure) if failure else None,
    }


def _print_row(row: dict[str, Any]) -> None:
    source = f"{row['distribution']} {row['version']}".strip() or "file"
    print(f"{row['name']:<24} {row['state']:<10} {source}")
    if row["error"]:
        print(f"    {row['error']}")
    elif row["provides"] is None:
        print(f"    (not imported; `sdxl-train plugins {row['name']}` asks it what it provides)")
    for kind, names in (row["provides"] or {}).items():
        print(f"    {kind}: {', '.join(names)}")
