"""The tensors of a file of a network, as training and clients name them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdxl_train.ldm.files.deltas import scale
from sdxl_train.ldm.files.opening import open_network

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from sdxl_train.ldm.family import Family
    from sdxl_train.ldm.files.network_file import StoredModule

_CARRIERS = {"loha": ("hada_w1_a",), "lokr": ("lokr_w1", "lokr_w1_a")}
"""What takes up the scale of algorithms of which files have an alpha equal to the rank."""


def read_tensors(path: Path, family: Family) -> dict[str, Tensor]:
    """Read all tensors under kohya's names, in fp32 on the CPU, whoever wrote the file.

    Every layer with a rank has an ``alpha``; of LoHa and LoKr it is the rank. Of a LoKr without a
    rank it is 1.

    Raises:
        UserError: With everything that is wrong with the file.
    """
    file = open_network(path, family)
    tensors: dict[str, Tensor] = {}
    with file.weights() as read:
        for module in file.modules.values():
            named = {name: tensor.float() for name, tensor in read(module).items()}
            tensors |= {f"{module.name}.{n}": t for n, t in _with_alpha(module, named).items()}
    return tensors


def _with_alpha(module: StoredModule, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if module.algorithm == "lokr" and module.rank is None:
        # Nobody reads it, and files differ in it.
        return {**tensors, "alpha": torch.tensor(1.0)}
    if module.rank is None:
        return tensors
    if module.algorithm in _CARRIERS:
        carrier = next(name for name in _CARRIERS[module.algorithm] if name in tensors)
        scaled = tensors[carrier] * scale(module, tensors)
        return {**tensors, carrier: scaled, "alpha": torch.tensor(float(module.rank))}
    return {"alpha": torch.tensor(float(module.rank)), **tensors}
