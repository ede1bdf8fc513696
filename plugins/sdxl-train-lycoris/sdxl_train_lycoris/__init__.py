"""LyCORIS networks for sdxl-train: every algorithm of lycoris-lora 4.1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import hookimpl
from sdxl_train_lycoris.networks import ALGORITHMS, Kohya

if TYPE_CHECKING:
    from sdxl_train import Network


@hookimpl
def register_networks() -> dict[str, type[Network]]:
    """Give each algorithm by its name, and all of them as sd-scripts users know them."""
    return {"lycoris.kohya": Kohya, **ALGORITHMS}
