"""How much a network adds to each block of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdxl_train.ldm import BadFileError, Family, NetworkFile, square_norm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def block_norms(state: Mapping[str, Tensor], family: Family) -> dict[str, float]:
    """Give the Frobenius norm of all deltas of each block together.

    Args:
        state: A network under its names in files, on any device.
        family: What it is for.

    Returns:
        The norms by block; empty for a network whose deltas cannot be told from its tensors alone.
    """
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        modules = NetworkFile.of_shapes(shapes, family).modules.values()
    except BadFileError:
        return {}
    squares: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for module in modules:
            tensors = {name: state[key] for name, key in module.keys.items()}
            found = None if module.needs_base else square_norm(module, tensors)
            if found is not None:
                squares.setdefault(module.block, []).append(found)
        if not squares:
            return {}
        totals = torch.stack([torch.stack(each).sum() for each in squares.values()]).sqrt()
    return dict(zip(squares, totals.tolist(), strict=True))
