"""The operation that computes a frozen layer with its low-rank delta, against its formula."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from sdxl_lora_plugins.networks.fused import adapted, can_fuse

if TYPE_CHECKING:
    from collections.abc import Callable

    Layer = nn.Linear | nn.Conv2d

RANK, SCALE = 3, 0.7
LAYERS: dict[str, Callable[[], Layer]] = {
    "linear": lambda: nn.Linear(6, 5),
    "linear without bias": lambda: nn.Linear(6, 5, bias=False),
    "conv": lambda: nn.Conv2d(4, 5, 3, padding=1),
    "strided conv": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "small conv without bias": lambda: nn.Conv2d(4, 5, 1, bias=False),
    "dilated conv": lambda: nn.Conv2d(4, 5, (3, 2), dilation=2, padding=(0, 1)),
}
layers = pytest.mark.parametrize("name", LAYERS)


def _frozen(name: str, dtype: torch.dtype = torch.float64) -> Layer:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    return layer.to(dtype).requires_grad_(requires_grad=False)


def _tensors(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Make input [2, ..., ] and factors, in the dtype of the layer, that want gradients."""
    torch.manual_seed(1)
    size = (2, 7, 6) if isinstance(layer, nn.Linear) else (2, 4, 6, 5)
    kernel = (1,) * (layer.weight.ndim - 2)
    shapes = (size, (RANK, *layer.weight.shape[1:]), (len(layer.weight), RANK, *kernel))
    made = [torch.randn(shape, dtype=layer.weight.dtype).requires_grad_() for shape in shapes]
    return made[0], made[1], made[2]


def _by_merged_weight(layer: Layer, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    delta = (up.flatten(1) @ down.flatten(1)).view(layer.weight.shape)
    merged = {"weight": layer.weight + SCALE * delta}
    output: Tensor = torch.func.functional_call(layer, merged, (x,))
    return output


@layers
def test_output_is_that_of_the_merged_weight(name: str) -> None:
    layer = _frozen(name)
    x, down, up = _tensors(layer)
    torch.testing.assert_close(
        adapted(x, layer, down, up, SCALE), _by_merged_weight(layer, x, down, up)
    )


@layers
def test_gradients_are_those_of_the_merged_weight(name: str) -> None:
    layer = _frozen(name)
    tensors = _tensors(layer)
    found = adapted(tensors[0], layer, *tensors[1:], SCALE)
    expected = _by_merged_weight(layer, *tensors)
    # Not one gradient for all outputs, and none that is contiguous.
    of_output = torch.randn(found.mT.shape, dtype=found.dtype).mT
    torch.testing.assert_close(
        torch.autograd.grad(found, tensors, of_output),
        torch.autograd.grad(expected, tensors, of_output),
    )


@layers
def test_inputs_that_want_no_gradient_get_none(name: str) -> None:
    layer = _frozen(name)
    x, down, up = _tensors(layer)
    torch.autograd.backward(adapted(x.detach(), layer, down, up, SCALE).sum())
    assert x.grad is None
    wanted = torch.autograd.grad(_by_merged_weight(layer, x, down, up).sum(), (down, up))
    torch.testing.assert_close((down.grad, up.grad), wanted)


def test_channels_last_stays_so_and_is_right() -> None:
    layer = _frozen("conv")
    x, down, up = _tensors(layer)
    found = adapted(x.to(memory_format=torch.channels_last), layer, down, up, SCALE)
    torch.testing.assert_close(found, _by_merged_weight(layer, x, down, up))
    assert found.is_contiguous(memory_format=torch.channels_last)
    wanted = torch.autograd.grad(_by_merged_weight(layer, x, down, up).sum(), (x, down, up))
    torch.testing.assert_close(torch.autograd.grad(found.sum(), (x, down, up)), wanted)


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_bf16_and_gives_gradients_in_fp32(
    name: str, stored: torch.dtype
) -> None:
    layer = _frozen(name, torch.float32)
    x, down, up = _tensors(layer)
    wanted = torch.autograd.grad(_by_merged_weight(layer, x, down, up).sum(), (x, down, up))
    layer.to(stored)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = adapted(x, layer, down, up, SCALE)
    assert found.dtype == torch.bfloat16
    gradients = torch.autograd.grad(found.sum(), (x, down, up))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    for gradient, right in zip(gradients, wanted, strict=True):
        # bf16 has 8 bits: each factor and each sum is within 2^-8 of its size.
        assert (gradient - right).norm() < 2**-6 * right.norm()


def test_only_plain_frozen_layers_are_computed_so() -> None:
    wrapped = _frozen("linear")
    own = wrapped.forward
    wrapped.forward = lambda x: own(x) + 1  # type: ignore[method-assign,assignment]
    reflecting = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect").requires_grad_(False)

    class Other(nn.Linear):
        """A layer that may compute anything."""

    assert can_fuse(_frozen("linear"))
    assert can_fuse(_frozen("conv"))
    assert not can_fuse(wrapped)
    assert not can_fuse(reflecting)
    assert not can_fuse(nn.Linear(4, 4))
    assert not can_fuse(Other(4, 4).requires_grad_(requires_grad=False))


@layers
def test_shapes_are_found_without_values(name: str) -> None:
    layer = _frozen(name)
    tensors = _tensors(layer)
    shape = _by_merged_weight(layer, *tensors).shape
    x, down, up = (tensor.to("meta") for tensor in tensors)
    assert adapted(x, layer.to("meta"), down, up, SCALE).shape == shape
