"""States saved and restored as a run does it, for contracts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train.state import Manifest, load_optimizer, save_state

if TYPE_CHECKING:
    from pathlib import Path

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

Pair = tuple["Optimizer", "LRScheduler"]


def through_a_file(folder: Path, old: Pair, new: Pair) -> None:
    """Give ``new`` the state of ``old`` by way of the files that ``--save_state`` writes."""
    manifest = Manifest(step=0, total=0, seed=0, options={}, dataset="", model="", plugins={})
    state = folder / "contract-state"
    optimizer = old[0].state_dict()
    save_state(state, manifest, parameters=[], optimizer=optimizer, scheduler=old[1], scaler=None)
    load_optimizer(state, optimizer=new[0], scheduler=new[1], scaler=None)
