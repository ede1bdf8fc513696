"""Write settings as a TOML file that ``--config_file`` reads back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import tomli_w

from sdxl_train.checkpoint import write_atomically
from sdxl_train.errors import UserError
from sdxl_train.registry import Registry
from sdxl_train.resolve import Resolver

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sdxl_train.options import Setting
    from sdxl_train.plugins import PluginHost

logger = logging.getLogger(__name__)

_NOT_WRITTEN = ("config_file", "output_config")


def write_settings(path: Path, settings: Mapping[str, Setting], host: PluginHost) -> None:
    """Write every option that was set, checked and in its own type.

    Raises:
        UserError: If an option is wrong, or the file exists.
    """
    if path.exists():
        raise UserError.of("--config_file", f"{path} exists already", "name another file")
    resolution = Resolver(settings, host, Registry(host)).resolve()
    if resolution.config is None or resolution.problems:
        raise UserError(resolution.problems)
    secrets = resolution.config.secrets()
    document: dict[str, Any] = {}
    for name, item in resolution.config.options().items():
        if item["origin"] == "default" or name in _NOT_WRITTEN or item["value"] is None:
            continue
        if name in secrets:
            logger.warning("%s is a secret, so it is not written to %s", name, path)
            continue
        table, dot, key = name.partition(".")
        if dot:
            document.setdefault(table, {})[key] = item["value"]
        else:
            document[name] = item["value"]
    write_atomically(path, tomli_w.dumps(document).encode())
