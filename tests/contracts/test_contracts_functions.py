"""The built-in noises, timesteps, losses and weightings keep the contracts of their kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdxl_lora_plugins import losses, noises, timesteps, weightings
from sdxl_train.testing import LossContract, NoiseContract, TimestepsContract, WeightingContract

if TYPE_CHECKING:
    from sdxl_train import NoiseSchedule


class TestImmiscible(NoiseContract):
    component = noises.Immiscible
    options = {"immiscible_noise": True}


class TestNoiseOffset(NoiseContract):
    component = noises.NoiseOffset
    options = {"noise_offset": 0.1}


class TestAdaptiveNoiseOffset(NoiseContract):
    component = noises.NoiseOffset
    options = {
        "noise_offset": 0.1,
        "noise_offset_random_strength": True,
        "adaptive_noise_scale": 0.2,
    }


class TestMultires(NoiseContract):
    component = noises.Multires
    options = {"multires_noise_iterations": 6}
    std = (0.999, 1.001)


class TestInputPerturbation(NoiseContract):
    component = noises.InputPerturbation
    options = {"ip_noise_gamma": 0.1}
    std = (1.0, 1.01)


class TestRandomInputPerturbation(NoiseContract):
    component = noises.InputPerturbation
    options = {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True}


class TestUniform(TimestepsContract):
    component = timesteps.Uniform

    def probabilities(self, schedule: NoiseSchedule) -> torch.Tensor:
        return torch.full((schedule.num_timesteps,), 1 / schedule.num_timesteps)


class TestUniformInARange(TimestepsContract):
    component = timesteps.Uniform
    options = {"min_timestep": 200, "max_timestep": 800}


class TestL2(LossContract):
    component = losses.L2


class TestL1(LossContract):
    component = losses.L1


class TestLogCosh(LossContract):
    component = losses.LogCosh


class TestHuber(LossContract):
    component = losses.Huber


class TestHuberExponential(LossContract):
    component = losses.Huber
    options = {"huber_schedule": "exponential", "huber_c": 0.05}


class TestSmoothL1(LossContract):
    component = losses.SmoothL1
    options = {"huber_schedule": "constant", "huber_scale": 2.0}


class TestMinSnr(WeightingContract):
    component = weightings.MinSnr
    options = {"min_snr_gamma": 5.0}


class TestDebiasedEstimation(WeightingContract):
    component = weightings.DebiasedEstimation
    options = {"debiased_estimation_loss": True}


class TestScaleVelocityLikeNoise(WeightingContract):
    component = weightings.ScaleVelocityLikeNoise
    options = {"scale_v_pred_loss_like_noise_pred": True}
    prediction_types = ("v_prediction",)


class TestVelocityLikeLoss(WeightingContract):
    component = weightings.VelocityLikeLoss
    options = {"v_pred_like_loss": 0.2}
    prediction_types = ("epsilon",)


class TestP2(WeightingContract):
    component = weightings.P2
    options = {"p2_gamma": 1.0, "p2_k": 0.5}
