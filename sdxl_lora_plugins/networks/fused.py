"""A frozen layer and its low-rank delta as one operation, forward and backward.

It computes ``y = W x + b + scale * B A x``. Against steps that autograd records it saves
passes over activations, which are most of what a low rank costs: the delta is added into the
output, the delta's share of the input's gradient into that of the layer, and under autocast the
input is converted once for both.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    FrozenLayer = nn.Linear | nn.Conv2d


def can_fuse(layer: nn.Module) -> TypeGuard[FrozenLayer]:
    """Tell whether a layer computes ``W x + b`` with a frozen weight and nothing else."""
    if "forward" in vars(layer) or any(p.requires_grad for p in layer.parameters()):
        return False
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    return type(layer) is nn.Linear


def adapted(x: Tensor, layer: FrozenLayer, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Give the output of a layer with its delta.

    Args:
        x: Input, [..., in], or [B, in, h, w] of convolutions.
        layer: One that :func:`can_fuse` accepts.
        down: ``A``, [r, in(, k, k)], with the stride and padding of the layer.
        up: ``B``, [out, r(, 1, 1)].
        scale: ``alpha / r``.

    Returns:
        [..., out], or [B, out, h, w], in the dtype of autocast where that is on, else of ``x``.
    """
    device = x.device.type
    # The meta device, on which shapes and operations are counted, has no autocast to ask for.
    is_mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_mixed else x.dtype
    tensors = [tensor.to(dtype) for tensor in (x, down, up.flatten(1))]
    with torch.autocast(device, enabled=False) if is_mixed else nullcontext():
        output: Tensor
        if isinstance(layer, nn.Linear):
            output = _Linear.apply(*tensors, layer.weight, layer.bias, scale)  # type: ignore[no-untyped-call]
        else:
            output = _Conv2d.apply(*tensors, layer, scale)  # type: ignore[no-untyped-call]
    return output


def _converted(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ down.T
        output = F.linear(rows, weight.to(x.dtype), _converted(bias, x.dtype))
        output.addmm_(low, up.T, alpha=scale)
        ctx.save_for_backward(rows, low, down, up, weight)
        ctx.shape, ctx.scale = x.shape, scale
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        rows, low, down, up, weight = ctx.saved_tensors
        of_output = gradients[0].reshape(-1, len(up))
        of_low = (of_output @ up).mul_(ctx.scale)
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = of_output @ weight.to(rows.dtype)
            of_input = of_input.addmm_(of_low, down).view(ctx.shape)
        of_up = (of_output.T @ low).mul_(ctx.scale)
        return of_input, of_low.T @ rows, of_up, None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, layer: nn.Conv2d, scale: float
    ) -> Tensor:
        how: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
        }
        bias = _converted(layer.bias, x.dtype)
        output: Tensor = F.conv2d(x, layer.weight.to(x.dtype), bias, groups=layer.groups, **how)
        low: Tensor = F.conv2d(x, down, **how)
        output.flatten(2).baddbmm_(up.expand(len(x), -1, -1), low.flatten(2), alpha=scale)
        ctx.save_for_backward(x, low, down, up, layer.weight)
        ctx.how, ctx.groups, ctx.scale = tuple(how.values()), layer.groups, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (of_output,) = gradients
        x, low, down, up, weight = ctx.saved_tensors

        def through(gradient: Tensor, factor: Tensor, groups: int, *wanted: bool) -> list[Any]:
            """Give the gradients of a convolution's input and weight."""
            mask = [*wanted, False]
            found: list[Any] = torch.ops.aten.convolution_backward(
                gradient, x, factor, None, *ctx.how, False, [0, 0], groups, mask
            )
            return found[:2]

        flat = of_output.flatten(2)
        of_low = (up.T * ctx.scale).expand(len(x), -1, -1).bmm(flat).view_as(low)
        of_up = flat.bmm(low.flatten(2).mT).sum(0).mul_(ctx.scale)
        wants_input = ctx.needs_input_grad[0]
        of_input, of_down = through(of_low, down, 1, wants_input, True)
        if wants_input:
            of_input += through(of_output, weight.to(x.dtype), ctx.groups, True, False)[0]
        return of_input, of_down, of_up, None, None
