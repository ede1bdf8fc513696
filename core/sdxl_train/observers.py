"""The observers of a run: built, given back what they kept, and asked for what states keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdxl_train.events import Events
from sdxl_train.protocols import WeightAverage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sdxl_train.observed import Run
    from sdxl_train.preflight import Prepared
    from sdxl_train.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What the observers of the run before kept in its state, by their names.

    Attributes:
        averages: Of those that average the weights, what that takes.
        observers: What each keeps for itself.
    """

    averages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    observers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Observers:
    """The observers that act in this process.

    Args:
        prepared: The run.
        ranks: Beside the main process only those act that act everywhere.
        run: The run as observers see it.
        kept: What the run before left for them; None if there was none.

    Attributes:
        events: Tells them what happens.
    """

    def __init__(self, prepared: Prepared, ranks: Ranks, run: Run, kept: Kept | None) -> None:
        config, host = prepared.config, prepared.host
        self.events = Events(
            host.manager,
            list(host.enabled.values()),
            strict=config.training.strict_observers,
            timeout=config.training.observer_timeout,
            ranks=ranks,
        )
        self._averages: dict[str, WeightAverage] = {}
        names = [e.qualified for e in config.entries if e.kind.name == "observer"]
        for name, observer in zip(names, config.observers, strict=True):
            if not (ranks.main or observer.everywhere):
                continue
            built = observer.build(run)
            self.events.add_observer(
                name, built, unlimited=observer.unlimited, everywhere=observer.everywhere
            )
            if isinstance(built, WeightAverage):
                self._averages[name] = built
                if kept is not None:
                    built.restore(kept.averages.get(name))

    def states(self, step: int) -> dict[str, dict[str, Any]]:
        """Give what a state after ``step`` keeps of them; :class:`Kept` takes it."""
        averages = {name: dict(each.state_after(step)) for name, each in self._averages.items()}
        return {"averages": averages, "observers": self.events.states()}

    def average_after(self, step: int) -> Sequence[Tensor] | None:
        """Give the average that one of them keeps of the weights, unless it has failed."""
        sound = (
            average
            for name, average in self._averages.items()
            if f"observer {name}" not in self.events.failures
        )
        average = next(sound, None)
        return average.average_after(step) if average else None
