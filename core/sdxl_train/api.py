"""The Python interface: the command line's work, as functions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_train.errors import UserError
from sdxl_train.plugins import PluginHost
from sdxl_train.settings import from_file, from_mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from sdxl_train.components import Component
    from sdxl_train.observed import RunResult
    from sdxl_train.options import Setting
    from sdxl_train.planning import Plan
    from sdxl_train.preflight import Prepared


logger = logging.getLogger(__name__)


def plan(options: Mapping[str, Any] | Path | str, *, components: Iterable[Component] = ()) -> Plan:
    """Check options and plan their run; no weights are read.

    Args:
        options: Option names and values, or the path of a TOML file of them. Those that a
            :class:`TrainingCommand` was given may be among them.
        components: Components made by the caller: ``[MyLoss(scale=2)]``. They need no registration
            and serve in place of the default of their kind, stacked kinds beside the others.

    Raises:
        UserError: With everything that is wrong.
    """
    from sdxl_train.planning import make_plan

    return make_plan(_prepared(options, components, {}, start=False))


def train(
    options: Mapping[str, Any] | Path | str,
    *,
    components: Iterable[Component] = (),
    events: Mapping[str, Callable[..., object]] | None = None,
    lap: Callable[[str], None] | None = None,
) -> RunResult:
    """Train as ``sdxl-train`` does with these options.

    Args:
        options: As for :func:`plan`.
        components: As for :func:`plan`.
        events: Functions to call, by the name of the event: ``{"step_finished": show}``. Each
            names the arguments of the event that it wants (see :mod:`sdxl_train.hookspecs`).
        lap: To measure where the time of a step goes: called with the name of each phase as it
            ends. In order: ``data``; ``forward`` and ``backward`` for each batch of the step;
            ``optimizer``, ``logging``, ``hooks``, ``saving``, ``hooks``, ``logging``. What it
            queues on the device, an event, lies between the work of the phases.

    Raises:
        UserError: If the input is wrong; nothing was started.
        TrainingError: If training fails.
    """
    from sdxl_train.planning import make_plan
    from sdxl_train.run import execute

    prepared = _prepared(options, components, events or {}, start=True)
    if prepared.config.dataset.debug_dataset:
        raise UserError.of(
            prepared.config.place("debug_dataset"),
            "trains nothing, and this function trains",
            "leave it out, or use the command line",
        )
    for text in prepared.warnings:
        logger.warning("%s", text)
    plan = make_plan(prepared)
    for text in plan.warnings[len(prepared.warnings) :]:
        logger.warning("%s", text)
    return execute(prepared, plan, lap=lap)


def _prepared(
    options: Mapping[str, Any] | Path | str,
    components: Iterable[Component],
    events: Mapping[str, Callable[..., object]],
    *,
    start: bool,
) -> Prepared:
    from sdxl_train.objects import plugin_of, settings_of
    from sdxl_train.preflight import prepare

    components = tuple(components)
    host = PluginHost()
    if components or events:
        host.add(plugin_of(components, events))
    return prepare(settings_of(components, _settings(options)), host, start=start)


def _settings(options: Mapping[str, Any] | Path | str) -> dict[str, Setting]:
    if isinstance(options, (Path, str)):
        return from_file(Path(options).expanduser())
    return from_mapping(options)
