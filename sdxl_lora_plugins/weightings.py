"""Weights of a sample's loss by its timestep.

``SNR`` is ``abar_t / (1 - abar_t)`` on the schedule that the run trains on. A weight that a paper
states for the error of the noise is times ``SNR / (SNR + 1)`` for the velocity, whose squared error
is larger by the inverse.

Where a weight says so, SNR is cut to between 1/1000 and 1000. sd-scripts has the upper end, so that
the cleanest timesteps keep some weight. The lower one keeps weights finite on a schedule of zero
terminal SNR; on SDXL's own, no timestep is so noisy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import Field, Problem, UserError, Weighting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sdxl_train import NoiseSchedule, PredictionType, RunConfig, WeightFunction

_MAX_SNR = 1000.0


def _cut_snr(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    return schedule.snr(timesteps).clamp(1.0 / _MAX_SNR, _MAX_SNR)


def _is_wanted(weighting: Weighting, strength: str) -> bool:
    """Tell whether a strength is set to more than "off", or the weighting was only named."""
    return strength not in weighting.model_fields_set or bool(getattr(weighting, strength))


def _required(
    weighting: Weighting, strength: str, usual: str, config: RunConfig
) -> Iterator[Problem]:
    """Refuse what only makes sense beside a strength, if nobody gave the strength."""
    if strength in weighting.model_fields_set or config.is_set(strength):
        return
    given = [config.place(name) for name in sorted(weighting.model_fields_set)]
    yield Problem(
        place=", ".join(given) or config.place("weighting"),
        message=f"has no effect without --{strength}",
        remedy=f"add --{strength} {usual}, or leave it out",
    )


def _mismatch(name: str, config: RunConfig, *, needed: PredictionType) -> Iterator[Problem]:
    """Refuse a weighting that is for models which predict something else, if that is known."""
    if config.model.predicts() in (None, needed):
        return
    wanted, found = ("velocity", "noise") if needed == "v_prediction" else ("noise", "velocity")
    given = config.is_set("v_parameterization")
    model = config.place("v_parameterization" if given else "pretrained_model_name_or_path")
    yield Problem(
        place=config.place(name),
        message=f"is for models that predict {wanted}; this one predicts {found} ({model})",
        remedy="leave it out, or say otherwise with --v_parameterization "
        f"{str(wanted == 'velocity').lower()}",
    )


class MinSnr(Weighting):
    """Min-SNR-gamma: early, nearly clean timesteps count less (Hang et al. 2023, eq. 9).

    ``min(SNR, gamma) / SNR`` for noise prediction, ``min(SNR, gamma) / (SNR + 1)`` for velocity.
    """

    min_snr_gamma: float = Field(0.0, ge=0, description="Gamma, usually 5. 0 = off.")

    def active(self) -> bool:
        """Tell whether there is any weighting; without a word of gamma, :meth:`check` asks."""
        return _is_wanted(self, "min_snr_gamma")

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse the name without a gamma."""
        yield from _required(self, "min_snr_gamma", "5", config)

    def build(self, schedule: NoiseSchedule) -> WeightFunction:
        """Build the weight function."""
        gamma = self.min_snr_gamma
        is_velocity = schedule.prediction_type == "v_prediction"

        def weight(timesteps: Tensor) -> Tensor:
            snr = schedule.snr(timesteps)
            if is_velocity:
                return snr.clamp(max=gamma) / (snr + 1.0)
            return gamma / snr.clamp(min=gamma)  # the same as min(snr, gamma) / snr, also at 0

        return weight


class DebiasedEstimation(Weighting):
    """Debiased estimation: noisy timesteps count more (Yu et al. 2024, "Debias the Training").

    ``1 / sqrt(SNR)`` for noise prediction, ``1 / (SNR + 1)`` for velocity; SNR is cut.
    """

    debiased_estimation_loss: bool = Field(
        False, description="Weight the loss by 1 / sqrt(SNR); for velocity by 1 / (SNR + 1)."
    )

    def active(self) -> bool:
        """Tell whether there is any weighting; to name it is to ask for it."""
        return _is_wanted(self, "debiased_estimation_loss")

    def build(self, schedule: NoiseSchedule) -> WeightFunction:
        """Build the weight function."""
        is_velocity = schedule.prediction_type == "v_prediction"

        def weight(timesteps: Tensor) -> Tensor:
            snr = _cut_snr(schedule, timesteps)
            return 1.0 / (snr + 1.0) if is_velocity else snr.rsqrt()

        return weight


class ScaleVelocityLikeNoise(Weighting):
    """Weights the velocity's error as the noise's would count: ``SNR / (SNR + 1)``.

    The identity ``v = sqrt(abar) noise - sqrt(1 - abar) x_0`` (Salimans & Ho 2022) gives the ratio
    of both errors. SNR at most 1000.
    """

    scale_v_pred_loss_like_noise_pred: bool = Field(
        False, description="Weight the loss of a velocity model like that of a noise model."
    )

    def active(self) -> bool:
        """Tell whether there is any weighting; to name it is to ask for it."""
        return _is_wanted(self, "scale_v_pred_loss_like_noise_pred")

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse a model that predicts the noise."""
        yield from _mismatch("scale_v_pred_loss_like_noise_pred", config, needed="v_prediction")

    def build(self, schedule: NoiseSchedule) -> WeightFunction:
        """Build the weight function.

        Raises:
            UserError: If the model predicts the noise.
        """
        if schedule.prediction_type != "v_prediction":
            raise UserError.of(
                "--scale_v_pred_loss_like_noise_pred",
                "is for models that predict velocity, and this one predicts the noise",
                "add --v_parameterization if it does predict velocity, or leave the option out",
            )

        def weight(timesteps: Tensor) -> Tensor:
            snr = schedule.snr(timesteps).clamp(max=_MAX_SNR)
            return snr / (snr + 1.0)

        return weight


class VelocityLikeLoss(Weighting):
    """Adds a share of the velocity's error to that of the noise: ``1 + w (SNR + 1) / SNR``.

    The inverse of ``scale-v-pred``, for models that predict the noise. SNR is cut.
    """

    v_pred_like_loss: float = Field(
        0.0, ge=0, description="Share w of a velocity-like loss that is added. 0 = off."
    )

    def active(self) -> bool:
        """Tell whether there is any weighting; without a word of its share, :meth:`check` asks."""
        return _is_wanted(self, "v_pred_like_loss")

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse the name without a share, and a model that predicts velocity."""
        yield from _required(self, "v_pred_like_loss", "0.5", config)
        yield from _mismatch("v_pred_like_loss", config, needed="epsilon")

    def build(self, schedule: NoiseSchedule) -> WeightFunction:
        """Build the weight function.

        Raises:
            UserError: If the model predicts velocity.
        """
        if schedule.prediction_type == "v_prediction":
            raise UserError.of(
                "--v_pred_like_loss",
                "is for models that predict the noise, and this one predicts velocity "
                "(--v_parameterization, or what the model says of itself)",
                "leave one of them out",
            )

        def weight(timesteps: Tensor) -> Tensor:
            snr = _cut_snr(schedule, timesteps)
            return 1.0 + self.v_pred_like_loss * (snr + 1.0) / snr

        return weight


class P2(Weighting):
    """P2: timesteps that hold little detail count more (Choi et al. 2022, eq. 8).

    ``1 / (k + SNR)^gamma`` for noise prediction, times ``SNR / (SNR + 1)`` for velocity.
    """

    p2_gamma: float = Field(0.0, ge=0, description="Gamma of P2, 0.5 to 1. 0 = off.")
    p2_k: float = Field(1.0, gt=0, description="k of P2: limits the weight of noisy timesteps.")

    def active(self) -> bool:
        """Tell whether there is any weighting; without a word of gamma, :meth:`check` asks."""
        return _is_wanted(self, "p2_gamma")

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse a k without a gamma."""
        yield from _required(self, "p2_gamma", "1", config)

    def build(self, schedule: NoiseSchedule) -> WeightFunction:
        """Build the weight function."""
        is_velocity = schedule.prediction_type == "v_prediction"

        def weight(timesteps: Tensor) -> Tensor:
            snr = schedule.snr(timesteps)
            weights = (self.p2_k + snr) ** -self.p2_gamma
            return weights * snr / (snr + 1.0) if is_velocity else weights

        return weight
