"""D-Adaptation: optimizers that estimate their rate while they train.

The step is ``lr d``, where ``d`` grows from ``d0`` towards the distance to the solution (Defazio &
Mishchenko 2023, "Learning-Rate-Free Learning by D-Adaptation"). So the learning rate is a factor,
usually 1, and the same for all groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sdxl_train import DecayRate, Field, LibraryOptimizer, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train import RunConfig


class _Estimated(LibraryOptimizer):
    """What they have in common."""

    single_lr: ClassVar[bool] = True

    learning_rate: float = Field(1.0, ge=0, description="Factor of the estimated rate, usually 1.")
    d0: float = Field(1e-6, gt=0, description="First estimate.")
    log_every: int = Field(0, ge=0, description="Log the estimate each so many steps; 0 = never.")


class _Growing(_Estimated):
    growth_rate: float | None = Field(
        None, gt=1, description="Limit to the growth of the estimate in a step, such as 1.02."
    )


class DAdaptAdam(_Growing):
    """Adam whose rate is estimated (Defazio & Mishchenko 2023, algorithm 5)."""

    path: ClassVar[str] = "dadaptation.DAdaptAdam"

    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.999), description="Decay of the running means of gradient and squared gradient."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")
    decouple: bool = Field(False, description="Decay as AdamW does, not as Adam.")
    use_bias_correction: bool = Field(
        False, description="Correct the means of the first steps, as Adam does."
    )


class DAdaptAdamPreprint(_Growing):
    """DAdaptAdam as it was in the first version of the paper: sd-scripts' ``DAdaptation``."""

    path: ClassVar[str] = "dadaptation.experimental.DAdaptAdamPreprint"

    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.999), description="Decay of the running means of gradient and squared gradient."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")
    decouple: bool = Field(False, description="Decay as AdamW does, not as Adam.")


class DAdaptAdaGrad(_Growing):
    """Adagrad whose rate is estimated (Defazio & Mishchenko 2023, algorithm 4)."""

    path: ClassVar[str] = "dadaptation.DAdaptAdaGrad"

    momentum: float = Field(0.0, ge=0, lt=1, description="Decay of the momentum.")
    eps: float = Field(1e-6, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")


class DAdaptAdan(_Growing):
    """Adan (Xie et al. 2022) whose rate is estimated."""

    path: ClassVar[str] = "dadaptation.DAdaptAdan"

    betas: tuple[DecayRate, DecayRate, DecayRate] = Field(
        (0.98, 0.92, 0.99),
        description="Decay of the means of gradients, of their differences and of squares.",
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.02, ge=0, description="Decay of the weights, times the rate.")
    no_prox: bool = Field(False, description="Decay as AdamW does, not by a proximal step.")


class DAdaptAdanIP(DAdaptAdan):
    """DAdaptAdan with another estimate, from inner products."""

    path: ClassVar[str] = "dadaptation.experimental.DAdaptAdanIP"


class DAdaptLion(_Estimated):
    """Lion (Chen et al. 2023) whose rate is estimated."""

    path: ClassVar[str] = "dadaptation.DAdaptLion"

    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.99), description="Shares of the running mean in a step, and in the next mean."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decay of the weights, times the rate.")


class DAdaptSGD(_Growing):
    """Stochastic gradient descent whose rate is estimated (algorithm 3)."""

    path: ClassVar[str] = "dadaptation.DAdaptSGD"

    momentum: float = Field(0.0, ge=0, lt=1, description="Decay of the momentum.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse a warm-up: it begins at a rate of 0, by which dadaptation would divide."""
        if config.scheduler.lr_warmup_steps:
            yield Problem(
                place=f"{config.place('lr_warmup_steps')}, {config.place('optimizer_type')}",
                message="DAdaptSGD divides by its rate, and a warm-up begins at 0",
                remedy="leave the warm-up out: D-Adaptation begins with a small rate by itself",
            )
