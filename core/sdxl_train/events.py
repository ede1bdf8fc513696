"""Tell observers what happens, and keep what happens to them from the run."""

from __future__ import annotations

import difflib
import logging
from functools import wraps
from typing import TYPE_CHECKING, Any

from sdxl_train.blame import blame
from sdxl_train.errors import SdxlTrainError
from sdxl_train.hookspecs import EVENTS, hookimpl
from sdxl_train.loading import Implementations, signature_fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from pluggy import PluginManager

    from sdxl_train.plugins import LoadedPlugin

logger = logging.getLogger(__name__)


class Events:
    """The events of one run.

    An observer that raises is reported once and not asked again; with ``strict`` the exception
    ends the run instead.

    Attributes:
        failures: What went wrong, by the name of the plugin or ``observer NAME``.
    """

    def __init__(
        self, manager: PluginManager, plugins: list[LoadedPlugin], *, strict: bool = False
    ) -> None:
        self.manager = manager
        self.plugins = plugins
        self.strict = strict
        self.failures: dict[str, str] = {}
        self._observers: list[str] = []

    def add_observer(self, name: str, observer: object) -> None:
        """Register the object that an Observer component built.

        Raises:
            SdxlTrainError: If none of its methods is an event, one looks like a misspelt event, or
                one wants arguments that its event does not have.
        """
        implementations = Implementations()
        for event in _events_of(name, observer):
            method = getattr(observer, event)
            fault = signature_fault(event, method)
            if fault:
                raise SdxlTrainError(f"observer '{name}': {fault}")
            setattr(implementations, event, _marked(method))
        self._observers.append(f"observer {name}")
        self.manager.register(implementations, name=f"observer {name}")

    def tell(self, event: str, **arguments: Any) -> None:
        """Call every implementation of an event: those of plugins first, then the observers.

        Within each, the order is that of enabling and of adding.
        """
        for impl in getattr(self.manager.hook, event).get_hookimpls():
            if impl.plugin_name in self.failures:
                continue
            try:
                impl.function(*(arguments[name] for name in impl.argnames))
            except (Exception, SystemExit) as error:
                # Whatever an observer does, the weights and the run's end are not its business.
                blame(error, self.plugins)
                # A run that has failed already ends with its own error.
                if self.strict and arguments.get("error") is None:
                    raise
                self.failures[impl.plugin_name] = f"{event}: {type(error).__name__}: {error}"
                logger.warning(
                    "%s failed in %s and is left out from here on: %s",
                    impl.plugin_name,
                    event,
                    "; ".join([f"{type(error).__name__}: {error}", *_notes(error)]),
                    exc_info=logger.isEnabledFor(logging.DEBUG),
                )

    def close(self) -> None:
        """Take the observers of this run off the manager."""
        while self._observers:
            self.manager.unregister(name=self._observers.pop())


def _events_of(name: str, observer: object) -> list[str]:
    """Give the events that an object listens to, refusing what it would never hear."""
    public = [
        attribute
        for attribute in dir(observer)
        if not attribute.startswith("_") and callable(getattr(observer, attribute))
    ]
    for attribute in public:
        near = difflib.get_close_matches(attribute, EVENTS, n=1, cutoff=0.8)
        if near and attribute not in EVENTS:
            raise SdxlTrainError(
                f"observer '{name}' has a method {attribute}, which is no event; "
                f"did you mean {near[0]}?"
            )
    heard = [attribute for attribute in public if attribute in EVENTS]
    if not heard:
        raise SdxlTrainError(
            f"observer '{name}' ({type(observer).__name__}) has no method that is an event; "
            f"events are {', '.join(EVENTS)}"
        )
    return heard


def _marked(method: Callable[..., object]) -> Callable[..., object]:
    """Mark a bound method as a hook implementation, as ``@hookimpl`` would."""

    # A bound method cannot carry the marker; the wrapper keeps its argument names for pluggy.
    @wraps(method)
    def implementation(*arguments: Any) -> object:
        return method(*arguments)

    return hookimpl(implementation)


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))
