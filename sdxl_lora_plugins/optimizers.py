"""Optimizers that come with torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from sdxl_train import Field, Optimizer

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
