"""Optimizers that come with torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sdxl_train import Field, LibraryOptimizer, Optimizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class AdamW(Optimizer):
    """AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    default: ClassVar[bool] = True

    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="Decay of the running means of gradient and squared gradient."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.01, ge=0, description="Decay of the weights, times the rate.")
    amsgrad: bool = Field(False, description="Divide by the largest second moment so far.")

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build ``torch.optim.AdamW``; on a GPU all parameters update in one kernel."""
        import torch

        first = groups[0]["params"][0]
        return torch.optim.AdamW(
            groups,
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            amsgrad=self.amsgrad,
            fused=first.is_cuda,
        )


class Adam(LibraryOptimizer):
    """Adam: steps of the running mean over its deviation (Kingma & Ba 2015)."""

    path: ClassVar[str] = "torch.optim.Adam"

    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="Decay of the running means of gradient and squared gradient."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")


class NAdam(Adam):
    """Adam with Nesterov momentum (Dozat 2016)."""

    path: ClassVar[str] = "torch.optim.NAdam"

    momentum_decay: float = Field(4e-3, ge=0, description="Decay of the momentum.")


class RAdam(Adam):
    """Adam with a rectified variance, which needs no warm-up (Liu et al. 2020)."""

    path: ClassVar[str] = "torch.optim.RAdam"


class Adamax(Adam):
    """Adam with the largest gradient in place of the deviation (Kingma & Ba 2015, section 7)."""

    path: ClassVar[str] = "torch.optim.Adamax"


class Adagrad(LibraryOptimizer):
    """Adagrad: steps over the sum of all squared gradients (Duchi et al. 2011)."""

    path: ClassVar[str] = "torch.optim.Adagrad"

    lr_decay: float = Field(0.0, ge=0, description="Decay of the rate.")
    eps: float = Field(1e-10, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")


class Adadelta(LibraryOptimizer):
    """Adadelta: steps in the weights' own unit (Zeiler 2012)."""

    path: ClassVar[str] = "torch.optim.Adadelta"

    rho: float = Field(0.9, ge=0, lt=1, description="Decay of the running means.")
    eps: float = Field(1e-6, gt=0, description="Added to both roots.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")


class RMSprop(LibraryOptimizer):
    """RMSprop: steps over the running deviation (Hinton 2012, lecture 6e)."""

    path: ClassVar[str] = "torch.optim.RMSprop"

    alpha: float = Field(0.99, ge=0, lt=1, description="Decay of the mean squared gradient.")
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Decay of the momentum.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")


class Sgd(LibraryOptimizer):
    """Stochastic gradient descent."""

    path: ClassVar[str] = "torch.optim.SGD"

    momentum: float = Field(0.0, ge=0, lt=1, description="Decay of the momentum.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")


class SgdNesterov(Sgd):
    """Stochastic gradient descent with Nesterov momentum (Sutskever et al. 2013)."""

    momentum: float = Field(0.9, gt=0, lt=1, description="Decay of the momentum.")
    nesterov: Literal[True] = Field(True, description="What the name says.")
