"""Base models in 4 and 8 bits: each format keeps the contract of quantizations."""

from __future__ import annotations

from typing import ClassVar

import torch

from sdxl_train.testing import QuantizationContract
from sdxl_train_bitsandbytes import register_quantizations

FORMATS = register_quantizations()


class TestNf4(QuantizationContract):
    component = FORMATS["nf4"]
    max_error: ClassVar[float] = 0.1

    def test_it_takes_four_bits_and_a_scale_for_each_64(self) -> None:
        """64 weights: 32 bytes and a scale of 4."""
        packed = self.form().pack(torch.randn(64, 64))
        assert sum(tensor.nbytes for tensor in packed) == 64 * (32 + 4)


class TestFp4(QuantizationContract):
    component = FORMATS["fp4"]
    max_error: ClassVar[float] = 0.15


class TestInt8(QuantizationContract):
    component = FORMATS["int8"]
    max_error: ClassVar[float] = 0.01

    def test_each_value_is_off_by_half_a_step_at_most(self) -> None:
        """A step is a 127th of the largest weight of its output channel."""
        weight = 0.02 * torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
        values = self.form().unpack(self.form().pack(weight), weight.shape, torch.float32)
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        assert (
            float(((values - weight).abs() / step).max()) < 0.57
        )  # fp16 rounds by a 2048th, before
