"""Stable Diffusion 1.x and 2.x for sdxl-train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import hookimpl
from sdxl_train_sd.models import Sd1, Sd2

if TYPE_CHECKING:
    from sdxl_train import Model

__all__ = ["Sd1", "Sd2"]


@hookimpl
def register_models() -> dict[str, type[Model]]:
    """Give the model families."""
    return {"sd1": Sd1, "sd2": Sd2}
