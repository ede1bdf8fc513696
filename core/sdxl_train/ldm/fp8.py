"""Frozen weights in 8 bits: stored as float8_e4m3fn, computed with in the precision of the run.

``float8_e4m3fn`` has 3 bits of mantissa and reaches from 2^-9 to 448 (Micikevicius et al. 2022,
"FP8 Formats for Deep Learning"). Weights of U-Nets are mostly below 2^-6, where it is coarser
still.
So each output channel is stored as ``weight / scale`` with ``scale = max |weight| / 448``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_STORED: Final = torch.float8_e4m3fn
_LARGEST: Final = torch.finfo(_STORED).max
_SMALLEST_SCALE: Final = torch.finfo(torch.float32).tiny


def store_in_fp8(module: nn.Module, within: Sequence[str]) -> None:
    """Store the weights of the linear layers and convolutions of some children in 8 bits.

    Args:
        module: Its parameters are frozen.
        within: Names of the children, as in ``named_modules``; the module itself is "".
    """
    stored: dict[type[nn.Module], type[_StoredLayer]] = {nn.Linear: Fp8Linear, nn.Conv2d: Fp8Conv2d}
    for name in within:
        for layer in module.get_submodule(name).modules():
            if kind := stored.get(type(layer)):
                weight = layer._parameters.pop("weight")
                assert weight is not None
                # The layer stays the same object: names, hooks and adapters refer to it.
                layer.__class__ = kind
                layer.compute_dtype = weight.dtype  # type: ignore[assignment]
                layer.weight = weight.detach()


class _StoredLayer(nn.Module):
    """A layer whose weight is stored in 8 bits; ``layer.weight`` gives its values.

    Whoever reads the weight gets a new tensor, so changing it in place changes nothing; assigning
    another tensor to ``layer.weight`` stores that.
    """

    stored: nn.Parameter
    scale: nn.Parameter
    compute_dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """The values, in the precision of the run."""
        return _values(self.stored, self.scale, self.compute_dtype)

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        """Store a weight [out, ...]: float8 of its shape, and a scale [out, 1, ...]."""
        wide = weight.detach().float()
        inputs = tuple(range(1, wide.ndim))
        scale = (wide.abs().amax(dim=inputs, keepdim=True) / _LARGEST).clamp(min=_SMALLEST_SCALE)
        stored = (wide / scale).clamp(-_LARGEST, _LARGEST).to(_STORED)
        self.stored = nn.Parameter(stored, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)


class Fp8Linear(_StoredLayer, nn.Linear):
    """A linear layer whose weight is stored in 8 bits."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer with the values of its weight."""
        x = input.to(self.compute_dtype)
        output: Tensor = _Linear.apply(x, self.stored, self.scale, self.bias)  # type: ignore[no-untyped-call]
        return output


class Fp8Conv2d(_StoredLayer, nn.Conv2d):
    """A convolution whose weight is stored in 8 bits."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer with the values of its weight."""
        x = input.to(self.compute_dtype)
        how = (self.stride, self.padding, self.dilation, self.groups)
        output: Tensor = _Conv.apply(x, self.stored, self.scale, self.bias, how)  # type: ignore[no-untyped-call]
        return output


def _values(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return stored.to(dtype) * scale.to(dtype)


class _Linear(torch.autograd.Function):
    """A linear layer that keeps 8 bits for the backward pass, not the values it computed with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(stored, scale)
        return F.linear(x, _values(stored, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        stored, scale = ctx.saved_tensors
        return gradient @ _values(stored, scale, gradient.dtype), None, None, None


class _Conv(torch.autograd.Function):
    """A convolution likewise."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None, how: Any
    ) -> Tensor:
        ctx.save_for_backward(stored, scale)
        ctx.shape, ctx.how = x.shape, how
        return F.conv2d(x, _values(stored, scale, x.dtype), bias, *how)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        stored, scale = ctx.saved_tensors
        weight = _values(stored, scale, gradient.dtype)
        of_input = conv2d_input(ctx.shape, weight, gradient, *ctx.how)  # type: ignore[no-untyped-call]
        return of_input, None, None, None, None
