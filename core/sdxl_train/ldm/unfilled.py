"""Modules of shapes only, to be planned with or to be given the weights of a file.

Each weight is stored as its layer stores it before the next is read, so that a model that is packed
is never there whole and unpacked.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.modeling_utils import no_init_weights
from torch.overrides import TorchFunctionMode

from sdxl_train.errors import UserError
from sdxl_train.finite import is_finite
from sdxl_train.ldm.headers import counted
from sdxl_train.quantized import formats_of, set_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn


class _NumbersOnCpu(TorchFunctionMode):
    """Makes ranges where they cost nothing: on the meta device they import sympy."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        place = {"device": "cpu"} if func is torch.arange else {}
        return func(*args, **{**place, **(kwargs or {})})


@contextmanager
def without_weights(dtype: torch.dtype) -> Iterator[None]:
    """Build modules on the meta device, whose initialisers would take long for nothing."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), _NumbersOnCpu(), no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def fill(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device,
    *,
    title: str,
    place: str,
) -> None:
    """Give a module of shapes its weights, where and in the dtype in which they are used.

    Args:
        module: The module, with the dtypes and the layout in memory that the weights shall have.
        tensors: Each parameter's path in the module and its values, read when it is their turn.
        device: Where they go.
        title: The module's, for people.
        place: Where the tensors come from.

    Raises:
        UserError: If there are values that are not finite, with which every image would give NaN.
    """
    bad: dict[str, str] = {}
    is_packed = bool(formats_of(module))
    layers = dict(module.named_modules())
    for path, stored in tensors:
        layer, _, name = path.rpartition(".")
        owner = layers[layer]
        shape: Tensor = getattr(owner, name)
        values = stored.to(device, shape.dtype)
        if not is_finite(values):
            bad[f"{title} {path}"] = str(shape.dtype).removeprefix("torch.")
        if values.stride() != shape.stride() or (is_packed and name in owner._parameters):
            # Also of what a packed module does not pack: a view would keep the file in memory.
            # Not `empty_like`, which imports sympy where the shape is on the meta device.
            apart = torch.empty_strided(
                shape.shape, shape.stride(), dtype=shape.dtype, device=device
            )
            values = apart.copy_(values)
        set_weight(owner, name, values)
    if bad:
        raise UserError.of(
            place,
            f"its weights are not finite as {next(iter(bad.values()))}, in {counted(list(bad))}",
            "download it again, or use another model; large values need --mixed_precision bf16",
        )


def fill_position_ids(encoder: nn.Module, device: torch.device) -> None:
    """Put the one buffer that no file holds, the positions of CLIP's tokens, on the device."""
    for module in encoder.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, torch.Tensor):
            numbers = torch.arange(ids.shape[-1]).expand(1, -1) if ids.is_meta else ids
            module.position_ids = numbers.to(device)
