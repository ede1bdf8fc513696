"""Say which plugin an exception came from."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

from sdxl_train.plugins import BUILTIN

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sdxl_train.plugins import LoadedPlugin


def blame(error: BaseException, plugins: Iterable[LoadedPlugin]) -> LoadedPlugin | None:
    """Add a note naming the plugin whose code raised ``error``, and give that plugin.

    The innermost frame that lies in a plugin's package decides. Costs nothing until something
    fails. The built-in plugin is not blamed: its errors are ours.
    """
    packages = {plugin.package: plugin for plugin in plugins if plugin.name != BUILTIN}
    frames = list(traceback.walk_tb(error.__traceback__))
    for frame, _ in reversed(frames):
        module = str(frame.f_globals.get("__name__", ""))
        for package, plugin in packages.items():
            if module == package or module.startswith(f"{package}."):
                note = f"raised in plugin {plugin.found}"
                if note not in getattr(error, "__notes__", []):
                    error.add_note(note)
                return plugin
    return None
