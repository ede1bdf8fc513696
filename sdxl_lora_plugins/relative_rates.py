"""The schedule of an Adafactor that sets its rate itself."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LRScheduler


class RelativeRates(LRScheduler):
    """Writes into each group, for logs, the rate at which its first parameter took the last step.

    Args:
        optimizer: transformers' Adafactor; it does not read the rate of its groups.
        first: What to show before the first step.
    """

    def __init__(self, optimizer: Any, first: float) -> None:
        self.first = first
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Give the rate of each group."""
        return [self._rate(group) for group in self.optimizer.param_groups]

    def _rate(self, group: dict[str, Any]) -> float:
        state = self.optimizer.state.get(group["params"][0])
        adafactor: Any = self.optimizer
        return float(adafactor._get_lr(group, state)) if state else self.first
