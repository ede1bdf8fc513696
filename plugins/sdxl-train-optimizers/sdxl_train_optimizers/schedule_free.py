"""Schedule-free optimizers: an average of the weights takes the place of a falling rate.

They train at ``y = (1 - beta) z + beta x`` and hand out the average ``x`` of all iterates ``z``
(Defazio et al. 2024, "The Road Less Scheduled", equations 2 to 4). What is saved, sampled and
validated is ``x``.
"""

from __future__ import annotations

from typing import ClassVar

from sdxl_train import DecayRate, Field, LibraryOptimizer


class _ScheduleFree(LibraryOptimizer):
    """What they have in common."""

    train_eval_modes: ClassVar[bool] = True
    own_schedule: ClassVar[bool] = True

    weight_decay: float = Field(0.0, ge=0, description="Decay of the weights, times the rate.")
    r: float = Field(0.0, description="Weigh the iterate of step t by t to this power.")
    weight_lr_power: float = Field(
        2.0, description="Weigh it by its rate to this power, which matters in a warm-up."
    )
    foreach: bool = Field(True, description="Update all weights at once; False takes less memory.")


class SGDScheduleFree(_ScheduleFree):
    """Stochastic gradient descent without a schedule (Defazio et al. 2024, algorithm 1)."""

    path: ClassVar[str] = "schedulefree.SGDScheduleFree"

    momentum: float = Field(
        0.9, gt=0, lt=1, description="DecayRate of the average in what is trained."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps in which the rate rises.")


class RAdamScheduleFree(_ScheduleFree):
    """RAdam (Liu et al. 2020) without a schedule; it needs no warm-up."""

    path: ClassVar[str] = "schedulefree.RAdamScheduleFree"

    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.999),
        description="DecayRate of the average in what is trained, and decay of squared gradients.",
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    silent_sgd_phase: bool = Field(
        True, description="Leave the weights as they are until the variance is known."
    )


class AdamWScheduleFree(_ScheduleFree):
    """AdamW without a schedule (Defazio et al. 2024, section 4)."""

    path: ClassVar[str] = "schedulefree.AdamWScheduleFree"

    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.999),
        description="DecayRate of the average in what is trained, and decay of squared gradients.",
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    warmup_steps: int = Field(0, ge=0, description="Steps in which the rate rises.")
