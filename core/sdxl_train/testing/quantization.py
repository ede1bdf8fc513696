"""The contract of quantizations."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sdxl_train.components import Quantization
from sdxl_train.protocols import MultiplyingFormat
from sdxl_train.quantized import quantize_layers
from sdxl_train.testing.contract import Contract, untouched_process

if TYPE_CHECKING:
    from torch import Tensor

    from sdxl_train.protocols import WeightFormat

_SHAPES = ((64, 128), (128, 64), (32, 48, 3, 3), (64, 32, 1, 1), (4, 320, 3, 3))
_DTYPES = (torch.float32, torch.bfloat16)


class QuantizationContract(Contract[Quantization]):
    """Frozen weights in fewer bits: near the exact ones, and trained through as if they were."""

    max_error: ClassVar[float] = 0.15
    """Bound to the error of normally distributed weights, as a share of their norm."""

    def form(self) -> WeightFormat:
        """Build the format."""
        form = self.make().build()
        assert form is not None, "it builds no format"
        return form

    @pytest.mark.parametrize("dtype", _DTYPES)
    def test_weights_come_back_nearly_as_they_were(self, dtype: torch.dtype) -> None:
        """The values have the shape and dtype that are asked for, and the error is bounded."""
        form = self.form()
        for shape in _SHAPES:
            weight = _weight(*shape).to(dtype)
            kept = weight.clone()
            values = form.unpack(form.pack(weight), weight.shape, dtype)
            assert values.shape == weight.shape
            assert values.dtype == dtype
            assert torch.equal(weight, kept), "it changes the weight that it is given"
            error = (values.float() - weight.float()).norm() / weight.float().norm()
            assert error < self.max_error, f"the error is {error:.3f} of the norm"

    def test_less_is_stored_than_in_16_bits(self) -> None:
        """A weight of usual size takes fewer bytes than in bf16."""
        packed = self.form().pack(_weight(256, 256))
        assert sum(tensor.nbytes for tensor in packed) < 2 * 256 * 256

    def test_weights_of_zeros_come_back_as_zeros(self) -> None:
        """No scale divides by zero."""
        zeros = torch.zeros(64, 64)
        form = self.form()
        assert torch.equal(form.unpack(form.pack(zeros), zeros.shape, zeros.dtype), zeros)

    def test_a_plan_knows_what_is_stored(self) -> None:
        """Shapes and dtypes on the meta device are those of real weights."""
        form = self.form()
        for shape in _SHAPES:
            real = form.pack(_weight(*shape))
            planned = form.pack(torch.empty(shape, device="meta"))
            assert [(t.shape, t.dtype) for t in planned] == [(t.shape, t.dtype) for t in real]
            values = form.unpack(planned, torch.Size(shape), torch.bfloat16)
            assert values.shape == shape

    @pytest.mark.parametrize("dtype", _DTYPES)
    def test_layers_compute_with_what_they_store(self, dtype: torch.dtype) -> None:
        """Outputs and gradients are those of the values, or near them where it multiplies."""
        form = self.form()
        layers: tuple[tuple[nn.Module, Tensor], ...] = (
            (nn.Linear(64, 32), _normal(5, 64)),
            (nn.Conv2d(16, 32, 3, padding=1), _normal(2, 16, 6, 5)),
        )
        for layer, x in layers:
            multiplies = isinstance(form, MultiplyingFormat) and x.ndim == 2
            root = nn.Sequential(layer).to(dtype).requires_grad_(False)
            exact: Any = deepcopy(layer)
            quantize_layers(root, ("",), form)
            exact.weight.data = root[0].weight
            outputs, gradients = [], []
            for module in (root, exact):
                given = x.to(dtype).requires_grad_()
                # As with gradient checkpointing, which gives what is kept only once.
                output = checkpoint(module, given, use_reentrant=False)
                output.backward(torch.cos(torch.arange(output.numel())).view_as(output).to(dtype))
                assert given.grad is not None
                outputs.append(output.detach())
                gradients.append(given.grad)
            for found, expected in (outputs, gradients):
                error = (found.float() - expected.float()).norm() / expected.float().norm()
                assert error < (self.max_error if multiplies else 0.02), f"the error is {error:.3f}"

    def test_process_is_left_alone(self) -> None:
        """Global generators, default dtype, threads and the like stay as they are."""
        with untouched_process():
            self.form().pack(_weight(64, 64))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _weight(*shape: int) -> Tensor:
    return 0.02 * _normal(*shape)
