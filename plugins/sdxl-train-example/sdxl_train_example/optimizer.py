"""Gradient descent with momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdxl_train import Field, Optimizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer as TorchOptimizer


class ExampleOptimizer(Optimizer):
    """Gradient descent with momentum (Polyak 1964), or Nesterov's."""

    momentum: float = Field(0.9, gt=0, lt=1, description="Share of the last step in the next.")
    nesterov: bool = Field(False, description="Look ahead along the momentum.")

    def build(self, groups: Sequence[dict[str, Any]]) -> TorchOptimizer:
        """Build over groups with ``params``, ``lr`` and ``name``."""
        from torch.optim import SGD

        return SGD(list(groups), momentum=self.momentum, nesterov=self.nesterov)
