"""Frozen layers whose weights are stored in another format than they are computed with in.

A layer stays the same object, for names, hooks and adapters refer to it. What it keeps for the
backward pass is the stored form; the values are unpacked once more there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input

from sdxl_train.protocols import MultiplyingFormat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sdxl_train.protocols import WeightFormat


def quantize_layers(module: nn.Module, within: Sequence[str], form: WeightFormat) -> None:
    """Store the weights of the linear layers and convolutions of some children in a format.

    Args:
        module: Its parameters are frozen. On the meta device too: what :func:`set_weight` gives its
            layers then is stored so from the start.
        within: Names of the children, as in ``named_modules``; the module itself is "".
        form: The format.
    """
    kinds: dict[type[nn.Module], type[_QuantizedLayer]] = {
        nn.Linear: QuantizedLinear,
        nn.Conv2d: QuantizedConv2d,
    }
    for name in within:
        for layer in module.get_submodule(name).modules():
            if kind := kinds.get(type(layer)):
                weight = layer._parameters.pop("weight")
                assert weight is not None
                layer.__class__ = kind
                quantized = cast("_QuantizedLayer", layer)
                quantized.form, quantized.shape = form, weight.shape
                quantized.compute_dtype = weight.dtype
                quantized.multiplies = isinstance(form, MultiplyingFormat) and form.can_multiply(
                    weight.shape
                )
                quantized.weight = weight.detach()


def set_weight(layer: nn.Module, name: str, values: Tensor) -> None:
    """Give a frozen layer other values, which it stores as it stored those before.

    Args:
        layer: The layer.
        name: Of a parameter, a buffer, or a weight in a format.
        values: Of the shape of those before, in the precision of the run.
    """
    before = layer._parameters.get(name)
    if before is not None:
        layer._parameters[name] = nn.Parameter(values, requires_grad=before.requires_grad)
    else:
        setattr(layer, name, values)


def formats_of(module: nn.Module) -> str:
    """Name the formats in which a module's layers store their weights; empty if in none."""
    layers = [layer for layer in module.modules() if isinstance(layer, _QuantizedLayer)]
    return " ".join(sorted({layer.form.name for layer in layers}))


class _QuantizedLayer(nn.Module):
    """A layer whose weight is stored in a format; ``layer.weight`` gives its values.

    Whoever reads the weight gets a new tensor, so changing it in place changes nothing; assigning
    another tensor to ``layer.weight`` stores that.
    """

    form: WeightFormat
    compute_dtype: torch.dtype
    shape: torch.Size
    multiplies: bool
    """The format multiplies with what is stored."""

    @property
    def packed(self) -> list[Tensor]:
        """The weight as it is stored."""
        return [p for name, p in self._parameters.items() if p is not None and name != "bias"]

    @property
    def weight(self) -> Tensor:
        """The values, in the precision of the run."""
        return self.form.unpack(self.packed, self.shape, self.compute_dtype)

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        """Store a weight of the layer's shape."""
        for index, tensor in enumerate(self.form.pack(weight.detach())):
            # Where packing had its intermediates: beside them it would keep holes in the heap.
            moved = tensor.clone()
            # A parameter, so that it counts and moves with the layer.
            self.register_parameter(f"packed_{index}", nn.Parameter(moved, requires_grad=False))


class QuantizedLinear(_QuantizedLayer, nn.Linear):
    """A linear layer of this kind."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer with the values of its weight, or with what is stored."""
        x = input.to(self.compute_dtype)
        if self.multiplies:
            rows = x.reshape(-1, x.shape[-1])
            product: Tensor = _Product.apply(rows, self.form, *self.packed)  # type: ignore[no-untyped-call]
            output = product.view(*x.shape[:-1], -1)
            return output if self.bias is None else output + self.bias
        if torch.compiler.is_compiling():
            # A compiler sees that it can unpack again, and fuses that with what comes before.
            return F.linear(x, self.weight, self.bias)
        values: Tensor = _Linear.apply(x, self.bias, self.form, self.shape, *self.packed)  # type: ignore[no-untyped-call]
        return values


class QuantizedConv2d(_QuantizedLayer, nn.Conv2d):
    """A convolution of this kind."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer with the values of its weight."""
        x = input.to(self.compute_dtype)
        how = (self.stride, self.padding, self.dilation, self.groups)
        output: Tensor = _Conv.apply(x, self.bias, how, self.form, self.shape, *self.packed)  # type: ignore[no-untyped-call]
        return output


class _Linear(torch.autograd.Function):
    """A linear layer that keeps the stored form, not the values it computed with."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, form: Any, shape: Any, *packed: Tensor) -> Tensor:
        return F.linear(x, form.unpack(packed, shape, x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, ctx.form, ctx.shape, *packed = inputs
        ctx.save_for_backward(*packed)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), packed = gradients, ctx.saved_tensors  # recomputed ones are given once
        weight = ctx.form.unpack(packed, ctx.shape, gradient.dtype)
        return gradient @ weight, None, None, None, *(None for _ in packed)


class _Product(torch.autograd.Function):
    """A linear layer without a bias, in products with what is stored."""

    @staticmethod
    def forward(rows: Tensor, form: Any, *packed: Tensor) -> Tensor:
        output: Tensor = form.product(rows, packed)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.form, *packed = inputs
        ctx.save_for_backward(*packed)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), packed = gradients, ctx.saved_tensors
        of_rows = ctx.form.product_back(gradient, packed)
        return of_rows, None, *(None for _ in packed)


class _Conv(torch.autograd.Function):
    """A convolution likewise."""

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, how: Any, form: Any, shape: Any, *packed: Tensor
    ) -> Tensor:
        return F.conv2d(x, form.unpack(packed, shape, x.dtype), bias, *how)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, ctx.how, ctx.form, ctx.shape, *packed = inputs
        ctx.of_input = x.shape
        ctx.save_for_backward(*packed)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), packed = gradients, ctx.saved_tensors  # recomputed ones are given once
        weight = ctx.form.unpack(packed, ctx.shape, gradient.dtype)
        of_input = conv2d_input(ctx.of_input, weight, gradient, *ctx.how)  # type: ignore[no-untyped-call]
        return of_input, None, None, None, None, *(None for _ in packed)
