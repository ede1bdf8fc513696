"""Losses against sd-scripts' numbers and torch's own losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from sdxl_lora_plugins import register_losses
from sdxl_train import NoiseSchedule

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdxl_train import Loss

LOSSES: dict[str, Any] = dict(register_losses())
GOLDEN_TIMESTEPS = torch.tensor([0, 1, 100, 500, 900, 999])


def by_element(loss: Loss, errors: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    target = torch.zeros(len(timesteps), 1, 1, len(errors))
    prediction = errors.expand_as(target).clone()
    found = loss.build(NoiseSchedule.scaled_linear())(prediction, target, timesteps)
    assert found.shape == target.shape
    assert found.dtype == torch.float32
    return found[:, 0, 0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1", [0, 0.05, 0.1, 1]),
        ("l2", [0, 0.0025, 0.01, 1]),
        ("huber", [0, 0.002361, 0.008284, 0.180998]),
        ("smooth_l1", [0, 0.023607, 0.082843, 1.809975]),
    ],
)
def test_losses_have_the_known_values(name: str, expected: list[float]) -> None:
    options: dict[str, Any] = (
        {"huber_schedule": "constant"} if name in ("huber", "smooth_l1") else {}
    )
    errors = torch.tensor([0, 0.05, 0.1, 1])
    found = by_element(LOSSES[name](**options), errors, torch.tensor([500]))
    assert found[0].tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", ["huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize(("c", "scale"), [(0.1, 1.0), (0.5, 2.0)])
def test_thresholds_equal_those_of_sd_scripts(
    name: str, schedule: str, c: float, scale: float, golden: Callable[[str], Any]
) -> None:
    row = golden("timestep_weights")[f"huber_c.{name}.{schedule}.c{c}.s{scale}"]
    if schedule == "snr":
        # There the scale is ignored; here it acts in every schedule.
        row = [scale * threshold for threshold in row]
    loss = LOSSES[name](huber_c=c, huber_scale=scale, huber_schedule=schedule)
    found = by_element(loss, torch.tensor([0.3]), GOLDEN_TIMESTEPS)[:, 0]
    factor = [2 * threshold if name == "huber" else 2 for threshold in row]
    expected = [
        f * ((0.3**2 + threshold**2) ** 0.5 - threshold)
        for f, threshold in zip(factor, row, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_huber_approaches_l2_and_smooth_l1_twice_l1() -> None:
    errors = torch.tensor([-3.0, 0.5, 2.0])
    middle = torch.tensor([500])
    wide = LOSSES["huber"](huber_c=1000, huber_schedule="constant")
    torch.testing.assert_close(
        by_element(wide, errors, middle)[0], errors.square(), rtol=0.05, atol=0
    )
    narrow = LOSSES["smooth_l1"](huber_c=1e-6, huber_schedule="constant")
    torch.testing.assert_close(by_element(narrow, errors, middle)[0], 2 * errors.abs())


def test_log_cosh_equals_its_definition_and_does_not_overflow() -> None:
    errors = torch.tensor([-2.0, -0.01, 0.0, 0.5, 3.0])
    log_cosh = LOSSES["log-cosh"]()
    found = by_element(log_cosh, errors, torch.tensor([0]))[0]
    torch.testing.assert_close(found, errors.cosh().log(), rtol=1e-4, atol=1e-6)
    large = by_element(log_cosh, torch.tensor([1e4]), torch.tensor([0]))
    assert large.item() == pytest.approx(1e4 - 0.6931, rel=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_are_finite_and_vanish_without_error(name: str) -> None:
    loss = LOSSES[name]().build(NoiseSchedule.scaled_linear())
    target = torch.zeros(1, 1, 1, 3)
    prediction = torch.tensor([0.0, -1.5, 2.5]).view(1, 1, 1, 3).requires_grad_()
    torch.autograd.backward(loss(prediction, target, torch.tensor([999])).sum())
    assert prediction.grad is not None
    first, second, third = prediction.grad.flatten().tolist()
    assert first == 0
    assert second < 0 < third


def test_l1_equals_that_of_torch() -> None:
    prediction, target = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    found = LOSSES["l1"]().build(NoiseSchedule.scaled_linear())(
        prediction, target, torch.tensor([3, 7])
    )
    torch.testing.assert_close(found, F.l1_loss(prediction, target, reduction="none"))


@pytest.mark.parametrize("options", [{"huber_c": 0}, {"huber_scale": -1}, {"huber_schedule": "x"}])
def test_senseless_thresholds_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LOSSES["huber"](**options)
