"""The wavelet loss keeps the contract of losses, and weighs what its options say."""

from __future__ import annotations

import pytest
import torch

from sdxl_train import NoiseSchedule
from sdxl_train.testing import LossContract
from sdxl_train_wavelet_loss import WaveletLoss

TIMESTEPS = torch.tensor([5])


def loss(error: torch.Tensor, **options: float) -> torch.Tensor:
    function = WaveletLoss(**options).build(NoiseSchedule.scaled_linear())
    return function(error, torch.zeros_like(error), TIMESTEPS)


class TestWaveletLoss(LossContract):
    component = WaveletLoss


class TestWaveletLossOfSeveralLevels(LossContract):
    component = WaveletLoss
    options = {"wavelet_levels": 3, "wavelet_coarse": 0.5, "wavelet_corners": 2.0}


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 6)])
def test_equal_weights_are_the_squared_error(levels: int, size: tuple[int, int]) -> None:
    error = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))

    found = loss(error, wavelet_levels=levels, wavelet_edges=1.0)

    # Parseval: an orthonormal transform keeps the sum of squares.
    torch.testing.assert_close(found.sum(), error.square().sum())


def test_each_weight_is_that_of_its_pattern() -> None:
    patterns = {
        "wavelet_coarse": [[1.0, 1.0], [1.0, 1.0]],
        "wavelet_edges": [[1.0, -1.0], [1.0, -1.0]],
        "wavelet_corners": [[1.0, -1.0], [-1.0, 1.0]],
    }
    weights = {"wavelet_coarse": 3.0, "wavelet_edges": 5.0, "wavelet_corners": 7.0}
    for name, pattern in patterns.items():
        # A 2 x 2 pattern of ones has one coefficient, 2, and so the energy 4.
        total = loss(torch.tensor(pattern).view(1, 1, 2, 2), **weights).sum().item()
        assert total == pytest.approx(4 * weights[name])


def test_a_coefficient_stands_where_its_pixels_are() -> None:
    error = torch.zeros(1, 1, 8, 8)
    error[..., 4:6, 2:4] = 1.0

    found = loss(error)

    assert found[..., 4:6, 2:4].sum() == found.sum() > 0
