"""Timestep weights against sd-scripts' numbers and the papers' formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdxl_lora_plugins import register_weightings
from sdxl_train import NoiseSchedule, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdxl_train import PredictionType, RunConfig, Weighting

WEIGHTINGS: dict[str, Any] = dict(register_weightings())
GOLDEN_TIMESTEPS = torch.tensor([0, 1, 100, 500, 900, 999])


def weights(weighting: Weighting, prediction_type: PredictionType, timesteps: Any) -> list[float]:
    schedule = NoiseSchedule.scaled_linear(prediction_type=prediction_type)
    found = weighting.build(schedule)(timesteps)
    assert found.dtype == torch.float32
    return found.tolist()


@pytest.mark.parametrize(
    ("name", "options", "prediction_type", "row"),
    [
        ("debiased-estimation", {"debiased_estimation_loss": True}, "epsilon", "eps.debiased"),
        ("debiased-estimation", {"debiased_estimation_loss": True}, "v_prediction", "v.debiased"),
        (
            "scale-v-pred",
            {"scale_v_pred_loss_like_noise_pred": True},
            "v_prediction",
            "scale_v_pred_like_noise",
        ),
        ("v-pred-like", {"v_pred_like_loss": 0.1}, "epsilon", "v_pred_like_0.1"),
        ("v-pred-like", {"v_pred_like_loss": 1.0}, "epsilon", "v_pred_like_1.0"),
    ],
)
def test_weights_equal_those_of_sd_scripts(
    name: str,
    options: dict[str, Any],
    prediction_type: PredictionType,
    row: str,
    golden: Callable[[str], Any],
) -> None:
    weighting = WEIGHTINGS[name](**options)
    assert weights(weighting, prediction_type, GOLDEN_TIMESTEPS) == pytest.approx(
        golden("timestep_weights")[row], rel=1e-5
    )


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("k", [0.5, 1.0])
def test_p2_weights_follow_their_formula(gamma: float, k: float) -> None:
    snr = NoiseSchedule.scaled_linear().snr(GOLDEN_TIMESTEPS).tolist()
    p2 = WEIGHTINGS["p2"](p2_gamma=gamma, p2_k=k)
    noise = [1 / (k + ratio) ** gamma for ratio in snr]
    assert weights(p2, "epsilon", GOLDEN_TIMESTEPS) == pytest.approx(noise, rel=1e-5)
    velocity = [weight * ratio / (ratio + 1) for weight, ratio in zip(noise, snr, strict=True)]
    assert weights(p2, "v_prediction", GOLDEN_TIMESTEPS) == pytest.approx(velocity, rel=1e-5)


ALL_CASES: list[tuple[str, dict[str, Any], PredictionType]] = [
    ("min-snr", {"min_snr_gamma": 5}, "epsilon"),
    ("min-snr", {"min_snr_gamma": 5}, "v_prediction"),
    ("debiased-estimation", {"debiased_estimation_loss": True}, "epsilon"),
    ("debiased-estimation", {"debiased_estimation_loss": True}, "v_prediction"),
    ("scale-v-pred", {"scale_v_pred_loss_like_noise_pred": True}, "v_prediction"),
    ("v-pred-like", {"v_pred_like_loss": 1}, "epsilon"),
    ("p2", {"p2_gamma": 1}, "epsilon"),
    ("p2", {"p2_gamma": 1}, "v_prediction"),
]


@pytest.mark.parametrize(("name", "options", "prediction_type"), ALL_CASES)
def test_weights_are_positive_and_finite_everywhere(
    name: str, options: dict[str, Any], prediction_type: PredictionType
) -> None:
    found = weights(WEIGHTINGS[name](**options), prediction_type, torch.arange(1000))
    assert all(0 < weight < float("inf") for weight in found)


@pytest.mark.parametrize(("name", "options", "prediction_type"), ALL_CASES)
def test_weights_stay_finite_with_zero_terminal_snr(
    name: str, options: dict[str, Any], prediction_type: PredictionType
) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type=prediction_type)
    weight = WEIGHTINGS[name](**options).build(schedule.with_zero_terminal_snr())
    found = weight(torch.arange(1000))
    assert bool(torch.isfinite(found).all())
    assert bool((found[:-1] > 0).all())
    assert bool(found[-1] >= 0)


def test_weights_are_those_of_the_schedule_that_is_trained_on() -> None:
    """sd-scripts computes them before it changes the schedule."""
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction").with_zero_terminal_snr()
    timesteps = torch.tensor([500, 990, 999])
    abar = schedule.alphas_cumprod[timesteps].double().tolist()
    snr = [a / (1 - a) for a in abar]
    min_snr = WEIGHTINGS["min-snr"](min_snr_gamma=5).build(schedule)(timesteps)
    expected = [min(ratio, 5) / (ratio + 1) for ratio in snr]
    assert min_snr.tolist() == pytest.approx(expected, rel=1e-4)
    assert min_snr[-1] == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("min-snr", {"min_snr_gamma": 0}),
        ("debiased-estimation", {"debiased_estimation_loss": False}),
        ("scale-v-pred", {"scale_v_pred_loss_like_noise_pred": False}),
        ("v-pred-like", {"v_pred_like_loss": 0}),
        ("p2", {"p2_gamma": 0, "p2_k": 2}),
    ],
)
def test_weightings_can_be_set_to_off(name: str, options: dict[str, Any]) -> None:
    assert not WEIGHTINGS[name](**options).active()


def test_p2_k_alone_is_refused() -> None:
    config: RunConfig | Any = SimpleNamespace(
        place=lambda name: f"--{name}", is_set=lambda name: False
    )
    (problem,) = WEIGHTINGS["p2"](p2_k=2).check(config)
    assert problem.place == "--p2_k"
    assert "--p2_gamma" in problem.message


def test_velocity_weightings_refuse_the_other_kind_of_model() -> None:
    scale = WEIGHTINGS["scale-v-pred"](scale_v_pred_loss_like_noise_pred=True)
    with pytest.raises(UserError, match=r"scale_v_pred_loss_like_noise_pred.*\n.*v_param"):
        weights(scale, "epsilon", GOLDEN_TIMESTEPS)
    with pytest.raises(UserError, match=r"v_pred_like_loss.*v_parameterization"):
        weights(WEIGHTINGS["v-pred-like"](v_pred_like_loss=1), "v_prediction", GOLDEN_TIMESTEPS)
