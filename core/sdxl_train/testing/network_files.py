"""Weights with a network merged in, from the tensors of its file alone, as clients compute them.

An independent statement of the formats, to hold a network's own forward against. ``alpha / rank``
is the scale throughout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def merged_weight(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Give a layer's weight with the delta of a LoRA, LoHa or LoKr file, DoRA's norm included.

    Args:
        weight: fp32 [out, in] or [out, in, h, w].
        tensors: The file's tensors of this layer, by their names behind the layer's.

    Raises:
        ValueError: If the names are of no format known here.
    """
    if "lora_down.weight" in tensors:
        delta, rank = _lora(tensors)
    elif "hada_w1_a" in tensors:
        delta, rank = _loha(tensors)
    elif any(name.startswith("lokr_w1") for name in tensors):
        delta, rank = _lokr(tensors)
    else:
        raise ValueError(
            f"no format known here has {', '.join(sorted(tensors))}; override merged_weight in "
            f"the contract with the format's formula"
        )
    scale = tensors["alpha"].item() / rank if rank else 1.0
    merged = weight + scale * delta.reshape(weight.shape)
    return _normalized(merged, tensors["dora_scale"]) if "dora_scale" in tensors else merged


def _lora(tensors: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """``up down`` (Hu et al. 2022); with a ``mid``, a Tucker product."""
    up, down = tensors["lora_up.weight"], tensors["lora_down.weight"]
    rank = down.shape[0]
    if "lora_mid.weight" in tensors:
        return _tucker(tensors["lora_mid.weight"], up.flatten(1).T, down.flatten(1)), rank
    return torch.tensordot(up.flatten(1), down, dims=1), rank


def _loha(tensors: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The elementwise product of two low-rank matrices (Hyeon-Woo et al. 2022)."""
    factors = []
    for side in ("1", "2"):
        a, b = tensors[f"hada_w{side}_a"], tensors[f"hada_w{side}_b"]
        tucker = tensors.get(f"hada_t{side}")
        factors.append(a @ b if tucker is None else _tucker(tucker, a, b))
    return factors[0] * factors[1], tensors["hada_w1_b"].shape[0]


def _lokr(tensors: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The Kronecker product of two factors, each whole or low-rank (Yeh et al. 2024)."""
    rank = 0
    factors = []
    for side in ("1", "2"):
        whole = tensors.get(f"lokr_w{side}")
        if whole is None:
            a, b = tensors[f"lokr_w{side}_a"], tensors[f"lokr_w{side}_b"]
            tucker = tensors.get(f"lokr_t{side}")
            rank = b.shape[0]
            whole = torch.tensordot(a, b, dims=1) if tucker is None else _tucker(tucker, a, b)
        factors.append(whole)
    first, second = factors
    first = first.reshape(*first.shape, *(1,) * (second.ndim - first.ndim))
    return torch.kron(first, second), rank


def _tucker(core: Tensor, out: Tensor, into: Tensor) -> Tensor:
    """Give [o, i, h, w] of a core [r, r, h, w], ``out`` [r, o] and ``into`` [r, i]."""
    return torch.einsum("rshw,ro,si->oihw", core, out, into)


def _normalized(merged: Tensor, norm: Tensor) -> Tensor:
    """Scale by DoRA's norm of each output or input channel (Liu et al. 2024, equation 5)."""
    axis = 0 if norm.shape[0] == merged.shape[0] else 1
    others = [dim for dim in range(merged.ndim) if dim != axis]
    shape = [1] * merged.ndim
    shape[axis] = merged.shape[axis]
    current = torch.linalg.vector_norm(merged, dim=others)
    scaled: Tensor = merged * (norm.flatten() / current).reshape(shape)
    return scaled
