"""The quick test for values that are not finite against torch's slow one."""

from __future__ import annotations

import pytest
import torch

from sdxl_train import is_finite

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 499, 999])
def test_one_value_that_is_not_finite_is_found(
    dtype: torch.dtype, value: float, position: int
) -> None:
    tensor = torch.randn(10, 100)
    assert is_finite(tensor.to(dtype))

    tensor.view(-1)[position] = value

    assert not is_finite(tensor.to(dtype))


def test_tensors_of_no_values_or_of_integers_are_finite() -> None:
    assert is_finite(torch.empty(0))
    assert is_finite(torch.arange(3))
    assert is_finite(torch.tensor([True]))
    assert is_finite(torch.finfo(torch.float16).max * torch.ones(2, dtype=torch.float16))
