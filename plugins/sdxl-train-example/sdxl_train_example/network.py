"""A network for linear layers, in one module: LoRA at its plainest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdxl_train import Network

if TYPE_CHECKING:
    from sdxl_train import LoadedModel

    from sdxl_train_example.adapter import LowRankAdapter


class ExampleNetwork(Network):
    """Low-rank deltas of the linear layers (Hu et al. 2022): ``W + alpha / rank * up down``."""

    def build(self, model: LoadedModel) -> LowRankAdapter:
        """Attach a new network to the parts that train."""
        # torch is imported here and not above: `sdxl-train --help` reads this module too.
        from sdxl_train_example.adapter import LowRankAdapter

        rank = self.network_dim or 4
        arguments: dict[str, Any] = {
            "rank": rank,
            "alpha": self.network_alpha or rank,
            "dropout": self.network_dropout or 0.0,
        }
        return LowRankAdapter(model, **arguments)
