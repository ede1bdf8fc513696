"""Nested values with tensors in them, as JSON and a flat set of tensors; nothing is pickled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_TENSOR, _TUPLE, _PAIRS, _DTYPE = "$tensor", "$tuple", "$pairs", "$dtype"
"""Keys of the objects that stand for what JSON does not have."""
_ORDER = "order"
"""Beside the name of a tensor that lies transposed in memory: its dimensions, outermost first."""


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Put the tensors of a value aside, and give the rest as plain JSON.

    Args:
        value: Dicts, lists and tuples of tensors, numbers, texts, dtypes and None, nested.
        tensors: Where they go: each under the path to it, such as ``optimizer.state.0.exp_avg``.
        name: The first word of the path.

    Raises:
        TypeError: If something else is in it, with the path to it.
    """
    import torch

    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        # A product of matrices may round otherwise when one of them lies transposed in memory.
        order = sorted(range(value.ndim), key=value.stride, reverse=True)
        if value.is_contiguous() or order == sorted(order):
            tensors[name] = value
            return {_TENSOR: name}
        tensors[name] = value.permute(order)
        return {_TENSOR: name, _ORDER: order}
    if isinstance(value, torch.dtype):
        return {_DTYPE: str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        inner = {key: pack(item, tensors, f"{name}.{key}") for key, item in value.items()}
        if all(isinstance(key, str) and not key.startswith("$") for key in inner):
            return inner
        return {_PAIRS: [[pack(key, {}, name), item] for key, item in inner.items()]}
    raise TypeError(f"{name} is a {type(value).__name__}, which has no place in a file")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put together what :func:`pack` took apart.

    Raises:
        KeyError: If a tensor is missing.
        ValueError: If a type is none.
    """
    import torch

    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        tensor = tensors[value[_TENSOR]]
        if _ORDER not in value:
            return tensor
        return tensor.permute([value[_ORDER].index(dim) for dim in range(tensor.ndim)])
    if _DTYPE in value:
        dtype = getattr(torch, value[_DTYPE], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value[_DTYPE]} is no type of tensors")
        return dtype
    if _TUPLE in value:
        return tuple(unpack(item, tensors) for item in value[_TUPLE])
    if _PAIRS in value:
        return {unpack(key, tensors): unpack(item, tensors) for key, item in value[_PAIRS]}
    return {key: unpack(item, tensors) for key, item in value.items()}
