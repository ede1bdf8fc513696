"""Frozen weights as whole numbers of 8 bits, with a scale for each output channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import Quantization

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdxl_train import WeightFormat
    from torch import Size, Tensor, dtype


class ExampleQuantization(Quantization):
    """Round weights to multiples of a 127th of the largest one of their output channel."""

    def build(self) -> WeightFormat:
        """Build the format."""
        return ExampleFormat()


class ExampleFormat:
    """int8 of the weight's shape, and a scale [out, 1, ...] in fp32."""

    name = "example"

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Store a weight."""
        import torch

        wide = weight.float()
        largest = wide.abs().amax(dim=tuple(range(1, wide.ndim)), keepdim=True)
        scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return (wide / scale).round().to(torch.int8), scale

    def unpack(self, packed: Sequence[Tensor], shape: Size, dtype: dtype) -> Tensor:
        """Give its values."""
        stored, scale = packed
        return stored.to(dtype) * scale.to(dtype)
