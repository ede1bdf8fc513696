"""Tell observers what happens, and keep what happens to them from the run."""

from __future__ import annotations

import difflib
import logging
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sdxl_train.blame import blame
from sdxl_train.errors import SdxlTrainError
from sdxl_train.hookspecs import EVENTS, hookimpl
from sdxl_train.loading import Implementations, signature_fault
from sdxl_train.packing import pack
from sdxl_train.ranks import ALONE
from sdxl_train.signals import TimeIsUp, time_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch
    from pluggy import PluginManager

    from sdxl_train.plugins import LoadedPlugin
    from sdxl_train.ranks import Ranks

logger = logging.getLogger(__name__)


@runtime_checkable
class KeepsState(Protocol):
    """What an observer's object has beside if a resumed run is to give it back what it knew."""

    def state_dict(self) -> Mapping[str, Any]:
        """Give what to keep: numbers, texts and tensors, in nested dicts, lists and tuples."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""


class Events:
    """The events of one run.

    An observer that raises, or takes longer than ``timeout`` seconds in a call, is reported once
    and not asked again; with ``strict`` the exception ends the run instead. What it changes of the
    process (threads, default type, gradient mode) is put back.

    With several processes, those beside the main one tell only observers that act everywhere; when
    such a one fails in any of them, it is left out in all.

    Attributes:
        failures: What went wrong, by the name of the plugin or ``observer NAME``.
    """

    def __init__(
        self,
        manager: PluginManager,
        plugins: list[LoadedPlugin],
        *,
        strict: bool = False,
        timeout: float = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.manager = manager
        self.ranks = ranks
        self.plugins = plugins
        self.strict = strict
        self.timeout = timeout
        self.failures: dict[str, str] = {}
        self._observers: list[str] = []
        self._unlimited: set[str] = set()
        self._everywhere: set[str] = set()
        self._keeping: dict[str, KeepsState] = {}

    def add_observer(
        self, name: str, observer: object, *, unlimited: bool = False, everywhere: bool = False
    ) -> None:
        """Register the object that an Observer component built.

        Args:
            name: Name of the component.
            observer: The object.
            unlimited: Its calls may take as long as they take.
            everywhere: Every process has it.

        Raises:
            SdxlTrainError: If none of its methods is an event, one looks like a misspelt event,
                one wants arguments that its event does not have, or it acts everywhere and wants to
                keep something in states.
        """
        implementations = Implementations()
        for event in _events_of(name, observer):
            method = getattr(observer, event)
            fault = signature_fault(event, method)
            if fault:
                raise SdxlTrainError(f"observer '{name}': {fault}")
            setattr(implementations, event, marked(method))
        self._observers.append(f"observer {name}")
        if unlimited:
            self._unlimited.add(f"observer {name}")
        if everywhere:
            self._everywhere.add(f"observer {name}")
        if isinstance(observer, KeepsState):
            if everywhere:  # the main process alone saves, so a failure there would stay alone
                raise SdxlTrainError(
                    f"observer '{name}': one that acts everywhere can keep nothing in states"
                )
            self._keeping[name] = observer
        self.manager.register(implementations, name=f"observer {name}")

    def tell(self, event: str, *, keepers: bool | None = None, **arguments: Any) -> None:
        """Call every implementation of an event: those of plugins first, then the observers.

        Within each, the order is that of enabling and of adding.

        Args:
            event: Its name.
            keepers: Call only those that keep something in states, or only the others.
            arguments: What the event offers.
        """
        for impl in getattr(self.manager.hook, event).get_hookimpls():
            if not (self.ranks.main or impl.plugin_name in self._everywhere):
                continue
            keeps = impl.plugin_name.removeprefix("observer ") in self._keeping
            if impl.plugin_name in self.failures or keepers not in (None, keeps):
                continue
            failed = bool(arguments.get("error"))
            # At its end a run may have failed in another process: they meet no more.
            meets = impl.plugin_name in self._everywhere and event != "run_finished"
            with self._isolated(impl.plugin_name, event, run_failed=failed, meets=meets):
                impl.function(*(arguments[name] for name in impl.argnames))

    def states(self) -> dict[str, Mapping[str, Any]]:
        """Give what observers keep in the states of the run, by their names."""
        kept: dict[str, Mapping[str, Any]] = {}
        for name, observer in self._keeping.items():
            if f"observer {name}" not in self.failures:
                with self._isolated(f"observer {name}", "state_dict"):
                    state = observer.state_dict()
                    pack(state, {}, "state")  # or the whole state of the run could not be saved
                    kept[name] = state
        return kept

    def restore(self, kept: Mapping[str, Mapping[str, Any]]) -> None:
        """Give observers back what they kept."""
        for name, observer in self._keeping.items():
            if name in kept:
                with self._isolated(f"observer {name}", "load_state_dict"):
                    observer.load_state_dict(kept[name])

    @contextmanager
    def _isolated(
        self, name: str, what: str, *, run_failed: bool = False, meets: bool = False
    ) -> Iterator[None]:
        """Keep what goes wrong in a call of an observer from the run, but for strict ones."""
        limit = 0 if name in self._unlimited else self.timeout
        shared = self.ranks.attempt() if meets else nullcontext()
        try:
            with kept_process_state(name), shared, time_limit(limit):
                yield
        except (Exception, SystemExit, TimeIsUp) as error:
            # Whatever an observer does, the weights and the run's end are not its business.
            blame(error, self.plugins)
            # A run that has failed already ends with its own error.
            if self.ranks.over or (self.strict and not run_failed):
                raise
            text = f"{type(error).__name__}: {error}"
            if isinstance(error, TimeIsUp):
                text = f"it took more than --observer_timeout {limit:g} seconds"
            self.failures[name] = f"{what}: {text}"
            logger.warning(
                "%s failed in %s and is left out from here on: %s",
                name,
                what,
                "; ".join([text, *_notes(error)]),
                exc_info=logger.isEnabledFor(logging.DEBUG),
            )

    def close(self) -> None:
        """Take the observers of this run off the manager."""
        while self._observers:
            self.manager.unregister(name=self._observers.pop())


@contextmanager
def kept_process_state(name: str) -> Iterator[None]:
    """Put back what decides how torch computes in this process, and say who had changed it.

    Generators need no such care: each draw of a step seeds its own (see :mod:`.rng`).
    """
    import torch

    before = _process_state()
    try:
        yield
    finally:
        if _process_state() != before:
            gradients, dtype, threads, deterministic = before
            torch.set_grad_enabled(gradients)
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)
            logger.warning(
                "%s changed torch's gradient mode, default type, threads or determinism for the "
                "whole process; put back",
                name,
            )


def _process_state() -> tuple[bool, torch.dtype, int, bool]:
    import torch

    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )


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


def marked(method: Callable[..., object]) -> Callable[..., object]:
    """Give a hook implementation that calls ``method``, a function or a bound method."""

    # A bound method cannot carry pluggy's marker; the wrapper keeps its argument names for pluggy.
    @wraps(method)
    def implementation(*arguments: Any) -> object:
        return method(*arguments)

    return hookimpl(implementation)


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))
