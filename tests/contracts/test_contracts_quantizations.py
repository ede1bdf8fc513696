"""The built-in quantizations keep the contract of their kind; errors of products are recorded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pytest
import torch

from sdxl_lora_plugins import quantizations
from sdxl_lora_plugins.fp8 import Fp8MatmulFormat
from sdxl_train.quantized import quantize_layers
from sdxl_train.testing import QuantizationContract

if TYPE_CHECKING:
    from sdxl_train import RunConfig


class TestFp8(QuantizationContract):
    component = quantizations.Fp8
    max_error: ClassVar[float] = 0.03


class TestFp8Matmul(QuantizationContract):
    component = quantizations.Fp8Matmul
    max_error: ClassVar[float] = 0.045


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_8_bits_are_those_of_the_values_that_they_stand_for(dtype: torch.dtype) -> None:
    """What a product adds to the rounding of its factors is only that of its own dtype."""
    generator = torch.Generator().manual_seed(0)
    form = Fp8MatmulFormat()
    weight = torch.randn(96, 64, generator=generator).to(dtype) * 0.02
    packed = form.pack(weight)
    values = form.unpack(packed, weight.shape, torch.float32)

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        return form.unpack(form.pack(rows), rows.shape, torch.float32)

    x = torch.randn(32, 64, generator=generator).to(dtype)
    torch.testing.assert_close(
        form.product(x, packed).float(), rounded(x) @ values.T, rtol=1e-2, atol=1e-3
    )
    # In the other direction a gradient is rounded with the scales of the weight in it.
    gradient, scales = torch.randn(32, 96, generator=generator).to(dtype), packed[1].T
    expected = rounded(gradient.float() * scales) @ packed[0].float()
    torch.testing.assert_close(
        form.product_back(gradient, packed).float(), expected, rtol=1e-2, atol=1e-3
    )


def test_matrices_of_other_sides_are_unpacked() -> None:
    form = Fp8MatmulFormat()
    assert form.can_multiply(torch.Size((1280, 640)))
    assert not form.can_multiply(torch.Size((1280, 4)))


@pytest.mark.parametrize(
    ("device", "capability", "refused"),
    [("cpu", (0, 0), False), ("cuda", (9, 0), False), ("cuda", (8, 6), True), ("mps", None, True)],
)
def test_gpus_without_products_of_8_bits_are_refused(
    device: str, capability: Any, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    stand_in: Any = SimpleNamespace(
        place=lambda name: f"--{name}", device=lambda: torch.device(device)
    )
    problems = list(quantizations.Fp8Matmul().machine_problems(cast("RunConfig", stand_in)))
    assert bool(problems) is refused
    assert all("--base_quantization fp8" in problem.remedy for problem in problems)


# The tracer looks at attributes of every tensor that it meets.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("component", [quantizations.Fp8, quantizations.Fp8Matmul])
def test_layers_are_compiled_without_a_break(component: Any) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(32, 48, bias=False), torch.nn.Linear(48, 16))
    layers.requires_grad_(False)
    quantize_layers(layers, ("",), component().build())
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    found = []
    for module in (layers, compiled):
        x = torch.ones(4, 32, requires_grad=True)
        output = module(x)
        torch.autograd.backward(output.square().sum())
        found.append((output.detach(), x.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_choice_of_parts_without_a_format_is_told() -> None:
    stand_in: Any = SimpleNamespace(place=lambda name: f"--{name}")
    told = quantizations.Unquantized(quantize_denoiser_only=True).remarks(stand_in)
    assert list(told) == ["--quantize_denoiser_only has no effect without base_quantization"]
    assert list(quantizations.Unquantized().remarks(stand_in)) == []
