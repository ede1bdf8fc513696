"""Lion, CAME, D-Adaptation, schedule-free and a hundred further optimizers for sdxl-train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import hookimpl
from sdxl_train_optimizers import came, d_adaptation, further, lion, schedule_free

if TYPE_CHECKING:
    from sdxl_train import Optimizer


@hookimpl
def register_optimizers() -> dict[str, type[Optimizer]]:
    """Give the optimizers under the names of sd-scripts or of their library, and their paths."""
    named: dict[str, type[Optimizer]] = {
        "Lion": lion.Lion,
        "CAME": came.Came,
        "DAdaptation": d_adaptation.DAdaptAdamPreprint,
        "DAdaptAdamPreprint": d_adaptation.DAdaptAdamPreprint,
        "DAdaptAdaGrad": d_adaptation.DAdaptAdaGrad,
        "DAdaptAdam": d_adaptation.DAdaptAdam,
        "DAdaptAdan": d_adaptation.DAdaptAdan,
        "DAdaptAdanIP": d_adaptation.DAdaptAdanIP,
        "DAdaptLion": d_adaptation.DAdaptLion,
        "DAdaptSGD": d_adaptation.DAdaptSGD,
        "AdamWScheduleFree": schedule_free.AdamWScheduleFree,
        "RAdamScheduleFree": schedule_free.RAdamScheduleFree,
        "SGDScheduleFree": schedule_free.SGDScheduleFree,
    }
    paths = {optimizer.path: optimizer for optimizer in named.values()}  # type: ignore[attr-defined]
    of = further.FromPytorchOptimizer.of
    others = {
        name: of(f"pytorch_optimizer.{name}") for name in (*further.FURTHER, *further.BY_PATH)
    }
    paths |= {optimizer.path: optimizer for optimizer in others.values()}
    return named | paths | {name: others[name] for name in further.FURTHER}
