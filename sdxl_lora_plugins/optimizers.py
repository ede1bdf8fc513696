"""Optimizers that come with torch, and Adafactor of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from sdxl_train import DecayRate, Field, LibraryOptimizer, Problem, quiet

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from sdxl_train import RunConfig


class OfTorch(LibraryOptimizer):
    """What those of torch have in common: each parameter is updated by itself."""

    fused_backward: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    foreach: bool | None = Field(
        None, description="Update all parameters at once, operation by operation."
    )


class Fusing(OfTorch):
    """What those have in common for which torch has one kernel that does a whole update."""

    fused: bool | None = Field(
        None, description="Update by one kernel. Default: where torch has it for the device."
    )

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the optimizer, fused unless something else is asked for."""
        fused = {"fused": _has_kernel(groups)} if self.fused is None and not self.foreach else {}
        built: torch.optim.Optimizer = self._built(groups, {"lr": self.learning_rate, **fused})
        return built


def _has_kernel(groups: Sequence[dict[str, Any]]) -> bool:
    """Tell whether torch has fused kernels where the parameters are."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return devices <= {"cpu", "cuda", "mps", "xpu"}


class AdamW(Fusing):
    """AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    default: ClassVar[bool] = True
    path: ClassVar[str] = "torch.optim.AdamW"

    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.999), description="Decay of the running means of gradient and squared gradient."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.01, ge=0, description="Decay of the weights, times the rate.")
    amsgrad: bool = Field(False, description="Divide by the largest second moment so far.")


class _AdamLike(OfTorch):
    """What Adam and its kin have in common."""

    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.999), description="Decay of the running means of gradient and squared gradient."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")


class Adam(Fusing, _AdamLike):
    """Adam: steps of the running mean over its deviation (Kingma & Ba 2015)."""

    path: ClassVar[str] = "torch.optim.Adam"


class NAdam(_AdamLike):
    """Adam with Nesterov momentum (Dozat 2016)."""

    path: ClassVar[str] = "torch.optim.NAdam"

    momentum_decay: float = Field(4e-3, ge=0, description="Decay of the momentum.")


class RAdam(_AdamLike):
    """Adam with a rectified variance, which needs no warm-up (Liu et al. 2020)."""

    path: ClassVar[str] = "torch.optim.RAdam"


class Adamax(_AdamLike):
    """Adam with the largest gradient in place of the deviation (Kingma & Ba 2015, section 7)."""

    path: ClassVar[str] = "torch.optim.Adamax"


class Adagrad(Fusing):
    """Adagrad: steps over the sum of all squared gradients (Duchi et al. 2011)."""

    path: ClassVar[str] = "torch.optim.Adagrad"
    elementwise: ClassVar[bool] = False  # DeepSpeed would put another one in its place

    lr_decay: float = Field(0.0, ge=0, description="Decay of the rate.")
    eps: float = Field(1e-10, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")


class Adadelta(OfTorch):
    """Adadelta: steps in the weights' own unit (Zeiler 2012)."""

    path: ClassVar[str] = "torch.optim.Adadelta"

    rho: float = Field(0.9, ge=0, lt=1, description="Decay of the running means.")
    eps: float = Field(1e-6, gt=0, description="Added to both roots.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")


class RMSprop(OfTorch):
    """RMSprop: steps over the running deviation (Hinton 2012, lecture 6e)."""

    path: ClassVar[str] = "torch.optim.RMSprop"

    alpha: float = Field(0.99, ge=0, lt=1, description="Decay of the mean squared gradient.")
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Decay of the momentum.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")


class Sgd(Fusing):
    """Stochastic gradient descent."""

    path: ClassVar[str] = "torch.optim.SGD"

    momentum: float = Field(0.0, ge=0, lt=1, description="Decay of the momentum.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")


class SgdNesterov(Sgd):
    """Stochastic gradient descent with Nesterov momentum (Sutskever et al. 2013)."""

    momentum: float = Field(0.9, gt=0, lt=1, description="Decay of the momentum.")
    nesterov: Literal[True] = Field(True, description="What the name says.")


class Adafactor(LibraryOptimizer):
    """Adafactor: squared gradients as means of rows and columns (Shazeer & Stern 2018).

    With ``relative_step`` it sets its rate itself: ``min(0.01, 1 / sqrt(step))`` times the size of
    each weight (section 8 of the paper). sd-scripts' schedule ``adafactor`` only shows that rate.
    """

    path: ClassVar[str] = "transformers.optimization.Adafactor"
    fused_backward: ClassVar[bool] = True

    relative_step: bool = Field(
        True, description="Set the rate by the step; False lets rates and schedule act."
    )
    scale_parameter: bool = Field(True, description="Times the root mean square of each weight.")
    warmup_init: bool = Field(
        False, description="Begin the relative step at 1e-6 per step; turns relative_step on."
    )
    eps: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = Field(
        (1e-30, 1e-3), description="Added to squared gradients; smallest size of a weight."
    )
    clip_threshold: float = Field(1.0, gt=0, description="Largest root mean square of a step.")
    decay_rate: float = Field(
        -0.8, lt=0, description="Power of the step by which squared gradients decay."
    )
    beta1: DecayRate | None = Field(None, description="Decay of the momentum. Default: none.")
    weight_decay: float = Field(0.0, ge=0, description="Decay of the weights, times the rate.")

    @classmethod
    def library_class(cls) -> Any:
        """Import the class, without what bitsandbytes says when transformers imports it."""
        with quiet("bitsandbytes"):
            return super().library_class()

    @property
    def is_relative(self) -> bool:
        """Whether it sets its rate itself; as in sd-scripts, ``warmup_init`` asks for that."""
        return self.relative_step or self.warmup_init

    def brings_schedule(self) -> str | None:
        """Give sd-scripts' name for it."""
        return f"adafactor:{self.learning_rate}" if self.is_relative else None

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse a warm-up that could not act."""
        if self.is_relative and config.scheduler.lr_warmup_steps:
            yield Problem(
                place=f"{config.place('lr_warmup_steps')}, {config.place('optimizer_type')}",
                message="Adafactor sets its rate itself (relative_step), so a warm-up cannot act",
                remedy="use --optimizer_args warmup_init=True, or relative_step=False",
            )

    def remarks(self, config: RunConfig) -> Iterator[str]:
        """Say what does not act with relative steps, and what is unusual without."""
        if self.warmup_init and not self.relative_step:
            yield "Adafactor: warmup_init=True turns relative_step on"
        scheduler = config.name_of("scheduler")
        if self.is_relative:
            idle = config.given_rates()
            if config.is_set("lr_scheduler") and scheduler.lower() != "adafactor":
                idle.append(config.place("lr_scheduler"))
            if idle:
                yield (
                    f"{', '.join(idle)}: no effect, for Adafactor sets its rate itself; "
                    "--optimizer_args relative_step=False lets rates and schedule act"
                )
            return
        if config.training.max_grad_norm:
            yield "Adafactor without relative_step: --max_grad_norm 0 is usual, as it clips itself"
        if scheduler != "constant_with_warmup":
            yield "Adafactor without relative_step: --lr_scheduler constant_with_warmup is usual"
        if self.clip_threshold != 1:
            yield "Adafactor without relative_step: clip_threshold=1 is usual"

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the optimizer of transformers."""
        relative = self.is_relative
        rate = None if relative else self.learning_rate
        options = {name: getattr(self, name) for name in _ADAFACTOR}
        target = self.library_class()
        built: torch.optim.Optimizer = target(groups, lr=rate, relative_step=relative, **options)
        return built

    def build_schedule(
        self, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Build what shows the rate of each group's first parameter."""
        from sdxl_lora_plugins.relative_rates import RelativeRates

        return RelativeRates(optimizer, self.learning_rate)


_ADAFACTOR = (
    "scale_parameter",
    "warmup_init",
    "eps",
    "clip_threshold",
    "decay_rate",
    "beta1",
    "weight_decay",
)
