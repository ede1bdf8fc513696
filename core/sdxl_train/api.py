"""The Python interface: the command line's work, as functions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_train.settings import from_file, from_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdxl_train.options import Setting
    from sdxl_train.planning import Plan
    from sdxl_train.run import RunResult


logger = logging.getLogger(__name__)


def plan(options: Mapping[str, Any] | Path | str) -> Plan:
    """Check options and plan their run; no weights are read.

    Args:
        options: Option names and values, or the path of a TOML file of them.

    Raises:
        UserError: With everything that is wrong.
    """
    from sdxl_train.planning import make_plan
    from sdxl_train.preflight import prepare

    return make_plan(prepare(_settings(options), decode=False))


def train(options: Mapping[str, Any] | Path | str) -> RunResult:
    """Train as ``sdxl-train`` does with these options.

    Args:
        options: As for :func:`plan`.

    Raises:
        UserError: If the input is wrong; nothing was started.
        TrainingError: If training fails.
    """
    from sdxl_train.planning import make_plan
    from sdxl_train.preflight import prepare
    from sdxl_train.run import execute

    prepared = prepare(_settings(options))
    for text in prepared.warnings:
        logger.warning("%s", text)
    return execute(prepared, make_plan(prepared))


def _settings(options: Mapping[str, Any] | Path | str) -> dict[str, Setting]:
    if isinstance(options, (Path, str)):
        return from_file(Path(options).expanduser())
    return from_mapping(options)
