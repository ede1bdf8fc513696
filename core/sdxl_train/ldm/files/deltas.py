"""The delta of a layer, computed from what a file holds for it.

The conventions are those that the clients agree on, and where they do not, LyCORIS's forward:

- ``alpha``: the delta is scaled by alpha / rank; without alpha by 1.
- LoRA (Hu et al. 2022): B A; with ``lora_mid`` (Tucker) the core is contracted with both factors.
- LoHa (Hyeon-Woo et al. 2022): (w1_a w1_b) * (w2_a w2_b), element by element.
- LoKr (Yeh et al. 2024): w1 (x) w2. Of two whole factors alpha is ignored, as by every client.
- DoRA (Liu et al. 2024): W' = m (W + D) / ||W + D||, the norm over all axes but the one that
  ``dora_scale`` has: the input's, which image UIs read, or the output's, peft's.
- (IA)^3 (Liu et al. 2022): W scaled by 1 + w, by output or input channel.
- OFT (Qiu et al. 2023): blocks of outputs rotated by R = (I + Q)(I - Q)^-1 with Q = B - B^T, whose
  norm is at most alpha times the outputs; BOFT (Liu et al. 2024): a product of such, shuffled.
- GLoRA (Chavan et al. 2023) as in LyCORIS: W a1 a2 + b1 b2.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sdxl_train.ldm.files.network_file import StoredModule

_OFT_EPS: Final = 1e-8
"""What LyCORIS adds to the norm of Q, so that 0 can be divided by it."""


def delta(
    module: StoredModule,
    tensors: Mapping[str, Tensor],
    base: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """Compute what a module adds to its layer's weight.

    Args:
        module: What the tensors are.
        tensors: They, by kohya's names, of any dtype.
        base: The layer's weight; needed where ``module.needs_base``. Of any dtype.
        dtype: In which to compute.

    Returns:
        The delta [out, in(, k, k)] in ``dtype``, of the shape of ``base`` if that is given; None
        where the module has a delta for the bias only.
    """
    values = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    weight = None if base is None else base.to(dtype)
    if weight is None and module.needs_base:
        raise ValueError(f"{module.name}: the delta of {module.title} needs the layer's weight")
    found = _plain(module, values, weight)
    if found is None or weight is None:
        return found
    found = found.reshape(weight.shape)
    if not module.is_dora:
        return found
    return _normalized(module, weight + found, values["dora_scale"]) - weight


def bias_delta(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Give what a module adds to its layer's bias [out], or None."""
    return next((tensors[name].to(dtype) for name in ("diff_b", "b_norm") if name in tensors), None)


def factors(
    module: StoredModule, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor] | None:
    """Give the delta as a product of two matrices, where it is stored as one.

    Returns:
        ``up`` [out, r] with the scale in it, and ``down`` [r, in k k]; None for everything but
        LoRA without DoRA. Of a Tucker decomposition ``down`` has the core in it.
    """
    if module.algorithm != "lora" or module.is_dora:
        return None
    up, down = _lora({name: tensor.to(dtype) for name, tensor in tensors.items()})
    return up * scale(module, tensors), down


def square_norm(
    module: StoredModule, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """Give the sum of the squares of a delta that needs no base weight, a scalar in ``dtype``.

    Of a product it is the trace of ``(up' up)(down down')``, which needs no matrix of the delta's
    own size. None where there is no delta of the weight.
    """
    product = factors(module, tensors, dtype)
    if product is not None:
        up, down = product
        return ((up.mT @ up) * (down @ down.mT)).sum()
    found = delta(module, tensors, dtype=dtype)
    return None if found is None else found.square().sum()


def scale(module: StoredModule, tensors: Mapping[str, Tensor]) -> float:
    """Give what the product of a module's factors is multiplied by: alpha / rank, or 1."""
    rank = module.rank
    if rank is None or "alpha" not in tensors:
        return 1.0
    return float(tensors["alpha"]) / rank


def _plain(
    module: StoredModule, values: Mapping[str, Tensor], weight: Tensor | None
) -> Tensor | None:
    """Give the delta before DoRA."""
    shape = module.weight_shape
    match module.algorithm:
        case "lora":
            up, down = _lora(values)
            product = up @ down
        case "loha":
            product = _half(values, "1") * _half(values, "2")
        case "lokr":
            product = _kronecker(values)
        case "full" | "norm":
            return values.get("diff", values.get("w_norm"))
        case "glora":
            assert weight is not None
            product = _glora(values, weight)
        case "ia3":
            assert weight is not None
            return _ia3(values, weight)
        case "oft" | "boft":
            assert weight is not None
            return _rotation(values, weight)
    assert shape is not None
    return product.reshape(shape) * scale(module, values)


def _lora(values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    up, down = values["lora_up.weight"].flatten(1), values["lora_down.weight"]
    if "lora_mid.weight" in values:
        down = torch.einsum("mrhw,ri->mihw", values["lora_mid.weight"], down.flatten(1))
    return up, down.flatten(1)


def _half(values: Mapping[str, Tensor], number: str) -> Tensor:
    """Give one of the two products of LoHa."""
    first, second = values[f"hada_w{number}_a"], values[f"hada_w{number}_b"]
    if f"hada_t{number}" in values:
        return _tucker(values[f"hada_t{number}"], first, second)
    return first @ second


def _kronecker(values: Mapping[str, Tensor]) -> Tensor:
    w1 = values["lokr_w1"] if "lokr_w1" in values else values["lokr_w1_a"] @ values["lokr_w1_b"]
    if "lokr_w2" in values:
        w2 = values["lokr_w2"]
    elif "lokr_t2" in values:
        w2 = _tucker(values["lokr_t2"], values["lokr_w2_a"], values["lokr_w2_b"])
    else:
        w2 = values["lokr_w2_a"] @ values["lokr_w2_b"]
    # torch's kron takes views, which a contracted core does not give.
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous())


def _tucker(core: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Contract a core [r, r, k, k] with factors [r, out] and [r, in]."""
    return torch.einsum("ij...,ip,jr->pr...", core, first, second)


def _glora(values: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    a1, a2 = values["a1.weight"].flatten(1), values["a2.weight"].flatten(1)
    b1, b2 = values["b1.weight"].flatten(1), values["b2.weight"]
    if "bm.weight" in values:
        b2 = torch.einsum("mrhw,ri->mihw", values["bm.weight"], b2.flatten(1))
    of_weight = torch.einsum("oi...,ij,jk->ok...", weight, a1, a2)
    return of_weight + (b1 @ b2.flatten(1)).reshape(weight.shape)


def _ia3(values: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    vector = values["weight"].flatten()
    on_input = bool(values["on_input"])
    shape = [1] * weight.ndim
    shape[1 if on_input else 0] = -1
    return weight * vector.reshape(shape)


def _rotation(values: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    blocks = values["oft_blocks"]
    rotations = _cayley(blocks, float(values.get("alpha", 0.0)) * len(weight))
    turned = weight
    if blocks.ndim == 3:
        pieces = weight.reshape(*blocks.shape[:2], -1)
        turned = torch.einsum("knm,kni->kmi", rotations, pieces).reshape(weight.shape)
    else:
        for stage, rotation in enumerate(rotations):
            turned = _butterfly(turned, rotation, stage)
    if "rescale" in values:
        turned = turned * values["rescale"].reshape(-1, *[1] * (weight.ndim - 1))
    return turned - weight


def _cayley(blocks: Tensor, limit: float) -> Tensor:
    """Turn blocks [..., n, n] into rotations; a limit of 0 is none."""
    skew = blocks - blocks.mT
    norm = torch.linalg.vector_norm(skew) + _OFT_EPS
    if 0 < limit < norm:
        skew = skew * limit / norm
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    inverse: Tensor = torch.linalg.inv(identity - skew)
    return (identity + skew) @ inverse


def _butterfly(weight: Tensor, rotation: Tensor, stage: int) -> Tensor:
    """Rotate groups of outputs that lie 2^stage half blocks apart."""
    size = rotation.shape[-1]
    stride = 2**stage * size // 2
    rows = torch.arange(len(weight)).reshape(-1, 2, stride).mT.flatten()
    turned = torch.einsum(
        "bij,bjx->bix", rotation, weight[rows].reshape(-1, size, prod(weight.shape[1:]))
    )
    result = torch.empty_like(weight)
    result[rows] = turned.reshape(weight.shape)
    return result


def _normalized(module: StoredModule, merged: Tensor, dora_scale: Tensor) -> Tensor:
    """Give a merged weight the norms of ``dora_scale``."""
    axis = 0 if module.dora_axis == "output" else 1
    others = [dim for dim in range(merged.ndim) if dim != axis]
    norm: Tensor = torch.linalg.vector_norm(merged, dim=others, keepdim=True)
    shape = [1] * merged.ndim
    shape[axis] = -1
    return merged * (dora_scale.reshape(shape) / (norm + torch.finfo(norm.dtype).eps))
