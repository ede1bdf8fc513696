"""Components and event functions that a Python program hands over, as a plugin of its own.

An object becomes what a user could have written: the name of its class, which this plugin provides,
and the options that it was made with. So it is checked, recorded and compared on resume like any
other component.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train.components import KINDS, Component, Kind
from sdxl_train.errors import Problem, UserError
from sdxl_train.events import marked
from sdxl_train.hookspecs import EVENTS
from sdxl_train.loading import (
    FoundPlugin,
    Implementations,
    LoadedPlugin,
    component_fault,
    signature_fault,
)
from sdxl_train.options import Setting, options_of, suggestion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

PLUGIN = "python"
"""Name of the plugin that stands for the calling program."""


def plugin_of(
    components: Iterable[Component], events: Mapping[str, Callable[..., object]]
) -> LoadedPlugin:
    """Make a plugin of these components and event functions.

    Raises:
        UserError: If one of them is of no kind, cannot be used, or hears of nothing.
    """
    problems: list[Problem] = []
    provided: dict[str, dict[str, type[Component]]] = {}
    for component in components:
        kind = _kind(component)
        fault = f"is no component: {component!r}" if kind is None else ""
        if kind is not None:
            classes = provided.setdefault(kind.name, {})
            fault = (
                component_fault(type(component))
                or _second(component, kind, classes)
                or _loss(component)
            )
            classes[type(component).__name__] = type(component)
        if fault:
            problems.append(Problem(place=f"components: {_title(component)}", message=fault))
    implementations = Implementations()
    for event, function in events.items():
        fault = _event_fault(event, function)
        if fault:
            problems.append(Problem(place=f"events: {event}", message=fault))
        else:
            setattr(implementations, event, marked(function))
    if problems:
        raise UserError(problems)
    found = FoundPlugin(name=PLUGIN, distribution="", version="", target="the calling program")
    return LoadedPlugin(
        found=found, module="__main__", implementations=implementations, components=provided
    )


def settings_of(
    components: Iterable[Component], given: Mapping[str, Setting]
) -> dict[str, Setting]:
    """Give ``given`` with the settings that choose these components and set their options.

    Raises:
        UserError: If ``given`` sets one of them too.
    """
    settings = dict(given)
    problems: list[Problem] = []
    for component in components:
        for name, setting in _settings(component).items():
            other = settings.get(name)
            if other is None:
                settings[name] = setting
            elif isinstance(setting.value, list) and isinstance(other.value, list):
                settings[name] = _setting([*other.value, *setting.value], other.place)
            else:
                problems.append(
                    Problem(
                        place=other.place,
                        message=f"is set by {setting.place} too",
                        remedy="leave one of them out",
                    )
                )
    if problems:
        raise UserError(problems)
    return settings


def _settings(component: Component) -> dict[str, Setting]:
    """Write an object down as options: its name, and what it was made with."""
    kind = _kind(component)
    if kind is None:
        raise TypeError(f"{component!r} is of no kind")
    place = f"component {_title(component)}"
    name = f"{PLUGIN}:{_title(component)}"
    settings = {kind.selector: _setting([name] if kind.stacked else name, place)}
    values = component.model_dump(mode="json", exclude_unset=True)
    own = {}
    for option, value in values.items():
        if options_of(type(component))[option].args:
            own[option] = value
        else:
            settings[option] = _setting(value, f"{place}.{option}")
    if own and kind.args:
        keys = {option: _setting(value, f"{place}.{option}") for option, value in own.items()}
        settings[kind.args] = Setting(value=own, place=place, origin=place, keys=keys)
    return settings


def _setting(value: object, place: str) -> Setting:
    return Setting(value=value, place=place, origin=place)


def _kind(component: object) -> Kind | None:
    kinds = (kind for kind in KINDS if kind.selector)
    return next((kind for kind in kinds if isinstance(component, kind.base)), None)


def _second(component: Component, kind: Kind, classes: Mapping[str, type[Component]]) -> str:
    if classes and not kind.stacked:
        return f"a run has one {kind.name}, and {', '.join(classes)} is given already"
    if _title(component) in classes:
        return f"a second {kind.name} of this class would have the same options; subclass it"
    return ""


def _loss(component: Component) -> str:
    """Say if the options do not tell all of an object: a run could not record or resume it."""
    again = type(component).model_validate_json(component.model_dump_json(exclude_unset=True))
    if again == component:
        return ""
    return f"its options make {again!r}, which is not the same; hold all of it in options"


def _event_fault(event: str, function: object) -> str:
    if event not in EVENTS:
        hint = suggestion(event, EVENTS) or f"events are {', '.join(EVENTS)}"
        return f"is no event; {hint}"
    return signature_fault(event, function) if callable(function) else "is not a function"


def _title(component: object) -> str:
    return type(component).__name__
