"""The formats, by bitsandbytes' operators: they run on CPUs and GPUs, and know the meta device.

Dettmers et al. 2023, "QLoRA" (4 bits), and 2022, "LLM.int8()" (8 bits by output channel). Products
are computed with the unpacked values, in the precision of the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from sdxl_train import quiet

with quiet("bitsandbytes"):
    import bitsandbytes  # noqa: F401 - registers the operators

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_BLOCK: Final = 64
"""Weights that share a scale."""
_LARGEST: Final = 127.0
_PIECE: Final = 1 << 18
"""Weights that are packed at a time in int8."""
_FEW_BLOCKS: Final = 1 << 20
"""Weights that are packed at a time in 4 bits."""


class FourBits:
    """Two weights in a byte, and a scale in fp32 for each 64 in a row.

    Args:
        kind: ``nf4`` or ``fp4``.
    """

    def __init__(self, kind: str) -> None:
        self.name = kind

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Store a weight, some blocks at a time: each weight is compared with all 16 values."""
        pieces = [
            torch.ops.bitsandbytes.quantize_4bit(some, _BLOCK, self.name, torch.uint8)
            for some in torch.split(weight.flatten(), _FEW_BLOCKS)
        ]
        packed, scales = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
        return packed, scales

    def unpack(self, packed: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Give its values."""
        stored, scales = packed
        # Not in the weight's shape: the CPU's kernel refuses an odd last dimension, as 3 x 3
        # convolutions have, and what stands in for it has torch's compiler imported.
        numbers = shape.numel()
        rows = [numbers // _BLOCK, _BLOCK] if numbers % _BLOCK == 0 else [1, numbers]
        values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            stored, scales, _BLOCK, self.name, rows, dtype
        )
        return values.view(shape)


class Int8Format:
    """int8 [out, ...], and the largest weight of each output channel in fp32."""

    name: str = "int8"

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Store a weight, some rows at a time: the intermediates take ten times its bytes."""
        rows = weight.reshape(len(weight), -1)
        stored = torch.empty_like(rows, dtype=torch.int8)
        largest = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        num_rows = max(1, _PIECE // rows.shape[1])
        pieces = (torch.split(tensor, num_rows) for tensor in (rows, stored, largest))
        for some, stored_here, largest_here in zip(*pieces, strict=True):
            # fp16 is the one type that GPUs take.
            packed, most, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(some.half())
            stored_here.copy_(packed)
            largest_here.copy_(most)
        return stored, largest

    def unpack(self, packed: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Give its values."""
        stored, largest = packed
        scale = (largest / _LARGEST).to(dtype)
        return stored.to(dtype).mul_(scale[:, None]).view(shape)
