"""Frozen weights in 4 or 8 bits, as bitsandbytes packs them. Light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import Quantization

if TYPE_CHECKING:
    from sdxl_train import WeightFormat


class Nf4(Quantization):
    """4 bits: the quantiles of a normal distribution, with a scale for each 64 weights (QLoRA)."""

    def build(self) -> WeightFormat:
        """Build the format."""
        from sdxl_train_bitsandbytes.formats import FourBits

        return FourBits("nf4")


class Fp4(Quantization):
    """4 bits as floating-point numbers, with a scale for each 64 weights; coarser than nf4."""

    def build(self) -> WeightFormat:
        """Build the format."""
        from sdxl_train_bitsandbytes.formats import FourBits

        return FourBits("fp4")


class Int8(Quantization):
    """8 bits: whole numbers, with a scale for each output channel (LLM.int8)."""

    def build(self) -> WeightFormat:
        """Build the format."""
        from sdxl_train_bitsandbytes.formats import Int8Format

        return Int8Format()
