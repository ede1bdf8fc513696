"""The tensors of a file of a network, as training and clients name them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from sdxl_lora_plugins.files.deltas import scale
from sdxl_lora_plugins.files.network_file import NetworkFile
from sdxl_lora_plugins.model.headers import BadFileError
from sdxl_train import Problem, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from sdxl_lora_plugins.files.network_file import StoredModule

_log = logging.getLogger(__name__)

_CARRIERS = {"loha": ("hada_w1_a",), "lokr": ("lokr_w1", "lokr_w1_a")}
"""What takes up the scale of algorithms of which files have an alpha equal to the rank."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors under kohya's names, in fp32 on the CPU, whoever wrote the file.

    Every layer with a rank has an ``alpha``; of LoHa and LoKr it is the rank.

    Raises:
        UserError: With everything that is wrong with the file.
    """
    try:
        file = NetworkFile.open(path)
    except BadFileError as error:
        raise UserError.of(str(path), str(error)) from error
    faults = list(file.faults())
    if faults:
        raise UserError(
            Problem(place=str(path), message=fault.message, remedy=fault.remedy) for fault in faults
        )
    for warning in file.warnings():
        _log.warning(warning)
    tensors: dict[str, Tensor] = {}
    with file.weights() as read:
        for module in file.modules.values():
            named = {name: tensor.float() for name, tensor in read(module).items()}
            tensors |= {f"{module.name}.{n}": t for n, t in _with_alpha(module, named).items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError.of(str(path), f"{name} is not finite", "use another file")
    return tensors


def _with_alpha(module: StoredModule, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if module.rank is None:
        return tensors
    if module.algorithm in _CARRIERS:
        carrier = next(name for name in _CARRIERS[module.algorithm] if name in tensors)
        scaled = tensors[carrier] * scale(module, tensors)
        return {**tensors, carrier: scaled, "alpha": torch.tensor(float(module.rank))}
    return {"alpha": torch.tensor(float(module.rank)), **tensors}
