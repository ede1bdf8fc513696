"""Networks: the options of each; what they build is in the module of its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sdxl_train import Network

if TYPE_CHECKING:
    from sdxl_train import Adapter, LoadedModel

DEFAULT_RANK = 4
"""sd-scripts' rank where none is given."""


class Lora(Network):
    """LoRA: low-rank deltas of attention and feed-forward layers (Hu et al. 2022)."""

    default: ClassVar[bool] = True

    def build(self, model: LoadedModel) -> Adapter:
        """Attach LoRA to every part that trains."""
        from sdxl_lora_plugins.networks.lora import LoraAdapter

        rank = self.network_dim or DEFAULT_RANK
        return LoraAdapter(
            model,
            rank=rank,
            # sd-scripts: an alpha of 0 stands for the rank.
            alpha=self.network_alpha or rank,
            dropout=self.network_dropout or 0.0,
        )
