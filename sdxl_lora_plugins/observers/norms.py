"""How much a network adds to each block of the model."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from sdxl_train.ldm import BadFileError, Family, NetworkFile, StoredModule, square_norm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@lru_cache(maxsize=1)  # a run asks for the same network over and over
def _modules(shapes: tuple[tuple[str, tuple[int, ...]], ...], family: Family) -> list[StoredModule]:
    try:
        return list(NetworkFile.of_shapes(dict(shapes), family).modules.values())
    except BadFileError:
        return []


def block_norms(state: Mapping[str, Tensor], family: Family) -> dict[str, float]:
    """Give the Frobenius norm of all deltas of each block together.

    Args:
        state: A network under its names in files, on any device.
        family: What it is for.

    Returns:
        The norms by block; empty for a network whose deltas cannot be told from its tensors alone.
    """
    modules = _modules(tuple((name, tuple(tensor.shape)) for name, tensor in state.items()), family)
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
