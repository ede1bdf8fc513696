"""The Prodigy optimizer for sdxl-train: it finds its learning rate by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sdxl_train import DecayRate, Field, LibraryOptimizer, hookimpl

if TYPE_CHECKING:
    from sdxl_train import Optimizer


class Prodigy(LibraryOptimizer):
    """Prodigy (Mishchenko & Defazio 2023, algorithm 4): Adam with a step size that it estimates.

    The step is ``lr d``, where ``d`` grows from ``d0`` towards the distance to the solution; so the
    learning rate is a factor, usually 1, and the same for all groups.
    """

    path: ClassVar[str] = "prodigyopt.Prodigy"
    single_lr: ClassVar[bool] = True

    learning_rate: float = Field(1.0, ge=0, description="Factor of the estimated rate, usually 1.")
    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.999), description="Decay of the running means of gradient and squared gradient."
    )
    beta3: float | None = Field(
        None, ge=0, lt=1, description="Decay of the estimate's means. Default: sqrt(second beta)."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.0, ge=0, description="Decay of the weights, times the rate.")
    decouple: bool = Field(True, description="Decay as AdamW does, not as Adam.")
    use_bias_correction: bool = Field(
        False, description="Correct the means of the first steps, as Adam does."
    )
    safeguard_warmup: bool = Field(
        False, description="Leave the rate's warm-up out of the estimate."
    )
    d0: float = Field(1e-6, gt=0, description="First estimate.")
    d_coef: float = Field(1.0, gt=0, description="Factor of the estimate, usually 0.5 to 2.")
    growth_rate: float | None = Field(
        None, gt=1, description="Limit to the growth of the estimate in a step, such as 1.02."
    )
    slice_p: int = Field(
        1, ge=1, description="Estimate from every so many-th element only, which saves memory."
    )


@hookimpl
def register_optimizers() -> dict[str, type[Optimizer]]:
    """Give the optimizer under its name and its path."""
    return {"Prodigy": Prodigy, "prodigyopt.Prodigy": Prodigy}
