"""Tell observers what happens, and keep what happens to them from the run."""

from __future__ import annotations

import difflib
import logging
from functools import wraps
from typing import TYPE_CHECKING, Any

from sdxl_train.blame import blame
from sdxl_train.errors import SdxlTrainError
from sdxl_train.hookspecs import EVENTS, PROJECT, hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable

    from pluggy import PluginManager

    from sdxl_train.plugins import LoadedPlugin

logger = logging.getLogger(__name__)


class _Methods:
    """The event methods of one observer; registered in its place, see ``plugins._Impls``."""


class Events:
    """The events of one run.

    An observer that raises is reported once, counted, and not asked again; with ``strict`` the
    exception ends the run instead.
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
            SdxlTrainError: If none of its methods is an event, or one looks like a misspelt event.
        """
        methods = _Methods()
        public = [
            attribute
            for attribute in dir(observer)
            if not attribute.startswith("_") and callable(getattr(observer, attribute))
        ]
        heard = [attribute for attribute in public if attribute in EVENTS]
        for attribute in set(public) - set(heard):
            meant = difflib.get_close_matches(attribute, EVENTS, n=1, cutoff=0.8)
            if meant:
                raise SdxlTrainError(
                    f"observer '{name}' has a method {attribute}; did you mean {meant[0]}?"
                )
        if not heard:
            raise SdxlTrainError(
                f"observer '{name}' ({type(observer).__name__}) has no event method; "
                f"events are {', '.join(EVENTS)}"
            )
        for attribute in heard:
            setattr(methods, attribute, _marked(getattr(observer, attribute)))
        self.manager.register(methods, name=f"observer {name}")
        self._observers.append(f"observer {name}")

    def tell(self, event: str, **arguments: Any) -> None:
        """Call every implementation of an event, in order of plugin name."""
        for impl in getattr(self.manager.hook, event).get_hookimpls():
            if impl.plugin_name in self.failures:
                continue
            try:
                impl.function(*(arguments[name] for name in impl.argnames))
            except Exception as error:
                # Whatever an observer does, the weights and the run's end are not its business.
                blame(error, self.plugins)
                if self.strict:
                    raise
                self.failures[impl.plugin_name] = f"{event}: {type(error).__name__}: {error}"
                logger.warning(
                    "%s failed in %s and is left out from here on: %s: %s",
                    impl.plugin_name,
                    event,
                    type(error).__name__,
                    error,
                    exc_info=logger.isEnabledFor(logging.DEBUG),
                )

    def close(self) -> None:
        """Take the observers of this run off the manager."""
        for name in self._observers:
            self.manager.unregister(name=name)


def _marked(method: Callable[..., object]) -> Callable[..., object]:
    """Mark a bound method as a hook implementation, as ``@hookimpl`` would."""
    if hasattr(method, f"{PROJECT}_impl"):
        return method

    # A bound method cannot carry the marker; the wrapper keeps its argument names for pluggy.
    @wraps(method)
    def implementation(*arguments: Any) -> object:
        return method(*arguments)

    return hookimpl(implementation)
