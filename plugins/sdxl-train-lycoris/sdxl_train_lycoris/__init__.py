"""LyCORIS networks for sdxl-train: LoRA, LoCon, LoHa and LoKr from lycoris-lora."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import hookimpl
from sdxl_train_lycoris.networks import Kohya, Loha, Lokr, Lora

if TYPE_CHECKING:
    from sdxl_train import Network


@hookimpl
def register_networks() -> dict[str, type[Network]]:
    """Give each algorithm by its name, and all of them as sd-scripts users know them."""
    return {
        "lycoris.kohya": Kohya,
        "lora": Lora,
        "locon": Lora,
        "loha": Loha,
        "lokr": Lokr,
    }
