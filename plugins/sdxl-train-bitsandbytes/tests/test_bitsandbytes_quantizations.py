"""Base models in 4 and 8 bits: each format keeps the contract of quantizations."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from bitsandbytes.backends.default import ops
from bitsandbytes.functional import get_4bit_type

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

    @pytest.mark.parametrize("shape", [(320, 4, 3, 3), (4, 320, 3, 3), (6, 5, 3, 3), (6, 64)])
    def test_kernels_of_odd_sides_need_no_compiler_and_take_the_nearest_values(
        self, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What stands in for the CPU's kernel has the compiler imported. Scales run over rows."""
        monkeypatch.setattr(ops, "_dequantize_4bit_compute", None)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        values = self.form().unpack(self.form().pack(weight), weight.shape, torch.float32)
        code = get_4bit_type("nf4", device="cpu")  # type: ignore[no-untyped-call]
        blocks = (torch.split(tensor.flatten(), 64) for tensor in (weight, values))
        for row, packed in zip(*blocks, strict=True):
            scale = row.abs().max()
            nearest = (row[:, None] / scale - code).abs().argmin(dim=1)
            assert torch.allclose(packed, code[nearest] * scale, atol=1e-6)


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
