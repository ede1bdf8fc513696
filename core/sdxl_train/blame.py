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

    The innermost frame that lies in the package of a plugin decides. Costs nothing until something
    fails. The built-in plugin is not blamed: its errors are ours.
    """
    suspects = [plugin for plugin in plugins if plugin.name != BUILTIN]
    frames = list(traceback.walk_tb(error.__traceback__))
    for frame, _ in reversed(frames):
        module = str(frame.f_globals.get("__name__", ""))
        plugin = max(suspects, key=lambda suspect: _kinship(module, suspect.module), default=None)
        if plugin is not None and _kinship(module, plugin.module):
            note = f"raised in plugin {plugin.found}"
            if note not in getattr(error, "__notes__", []):
                error.add_note(note)
            return plugin
    return None


def _kinship(module: str, other: str) -> int:
    """Count the packages that two modules share: two plugins may come in one package."""
    count = 0
    for one, two in zip(module.split("."), other.split("."), strict=False):
        if one != two:
            break
        count += 1
    return count
