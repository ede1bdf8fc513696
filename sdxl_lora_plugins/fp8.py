"""Formats of 8-bit floating point: stored only, or multiplied as well.

``float8_e4m3fn`` has 3 bits of mantissa and reaches from 2^-9 to 448 (Micikevicius et al. 2022,
"FP8 Formats for Deep Learning"). Weights of U-Nets are mostly below 2^-6, where it is coarser
still.
So each output channel is stored as ``weight / scale`` with ``scale = max |weight| / 448``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_STORED: Final = torch.float8_e4m3fn
_LARGEST: Final = torch.finfo(_STORED).max
_SMALLEST_SCALE: Final = torch.finfo(torch.float32).tiny
_MULTIPLE: Final = 16
"""Sides of matrices must be a multiple of this for the products of a GPU."""


class Fp8Format:
    """float8 of the weight's shape, and a scale [out, 1, ...] in fp32."""

    name: str = "fp8"

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Store a weight."""
        return _scaled(weight, tuple(range(1, weight.ndim)))

    def unpack(self, packed: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Give its values."""
        stored, scale = packed
        return stored.to(dtype).mul_(scale.to(dtype))


class Fp8MatmulFormat(Fp8Format):
    """The same, with products of float8 in both passes.

    What is multiplied with a weight is rounded too, each of its rows with a scale of its own.
    """

    def can_multiply(self, shape: torch.Size) -> bool:
        """Tell whether there are products for a weight [out, in]."""
        return all(side % _MULTIPLE == 0 for side in shape)

    def product(self, rows: Tensor, packed: Sequence[Tensor]) -> Tensor:
        """Give ``rows @ W.T`` for rows [n, in]."""
        weight, of_outputs = packed
        stored, of_rows = _scaled(rows, (1,))
        return torch._scaled_mm(
            stored, weight.T, scale_a=of_rows, scale_b=of_outputs.T, out_dtype=rows.dtype
        )

    def product_back(self, gradient: Tensor, packed: Sequence[Tensor]) -> Tensor:
        """Give ``gradient @ W`` for a gradient [n, out].

        The scales of the weight belong to what is summed over, so the gradient takes them.
        """
        weight, of_outputs = packed
        stored, of_rows = _scaled(gradient.float() * of_outputs.T, (1,))
        ones = torch.ones_like(weight[:1], dtype=torch.float32)  # [1, in]
        # The second factor of a GPU's product must lie transposed.
        turned = weight.T.contiguous().T
        return torch._scaled_mm(
            stored, turned, scale_a=of_rows, scale_b=ones, out_dtype=gradient.dtype
        )


def _scaled(values: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Give values as float8, and the scales in fp32 by which they are to be multiplied."""
    wide = values.float()
    scale = (wide.abs().amax(dim=over, keepdim=True) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return (wide / scale).clamp(-_LARGEST, _LARGEST).to(_STORED), scale
