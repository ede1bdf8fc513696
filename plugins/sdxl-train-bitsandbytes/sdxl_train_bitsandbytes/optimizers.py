"""The optimizers: options of each, and what bitsandbytes builds of them.

State of 8 bits is quantised in blocks (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
Quantization"); tensors of fewer elements than ``min_8bit_size`` keep 32 bits. Paged state lives in
memory that moves to the CPU when the GPU is full (Dettmers et al. 2023, "QLoRA").
"""

from __future__ import annotations

from typing import Any, ClassVar

from sdxl_train import DecayRate, Field, LibraryOptimizer, quiet


class FromBitsandbytes(LibraryOptimizer):
    """What all have in common: each parameter is updated by itself."""

    fused_backward: ClassVar[bool] = True

    @classmethod
    def library_class(cls) -> Any:
        """Import the class, without what bitsandbytes says of the machine."""
        with quiet("bitsandbytes"):
            return super().library_class()


class _Quantised(FromBitsandbytes):
    """What those with typed options have in common."""

    min_8bit_size: int = Field(
        4096, ge=0, description="Tensors of fewer elements keep state of 32 bits."
    )


class AdamW8bit(_Quantised):
    """AdamW (Loshchilov & Hutter 2019) with state of 8 bits: a quarter of its memory."""

    path: ClassVar[str] = "bitsandbytes.optim.AdamW8bit"

    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.999), description="Decay of the running means of gradient and squared gradient."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.01, ge=0, description="Decay of the weights, times the rate.")


class Adam8bit(AdamW8bit):
    """Adam (Kingma & Ba 2015) with state of 8 bits; in bitsandbytes its decay is AdamW's."""

    path: ClassVar[str] = "bitsandbytes.optim.Adam8bit"

    weight_decay: float = Field(0.0, ge=0, description="Decay of the weights, times the rate.")


class PagedAdamW(AdamW8bit):
    """AdamW with state of 32 bits that moves to the CPU when the GPU is full."""

    path: ClassVar[str] = "bitsandbytes.optim.PagedAdamW"


class PagedAdamW8bit(AdamW8bit):
    """AdamW with state of 8 bits that moves to the CPU when the GPU is full."""

    path: ClassVar[str] = "bitsandbytes.optim.PagedAdamW8bit"


class PagedAdamW32bit(AdamW8bit):
    """AdamW with state of 32 bits that moves to the CPU; another name of PagedAdamW."""

    path: ClassVar[str] = "bitsandbytes.optim.PagedAdamW32bit"


class Lion8bit(_Quantised):
    """Lion (Chen et al. 2023): the sign of the momentum, with state of 8 bits.

    Wants about a third of AdamW's rate and three times its weight decay.
    """

    path: ClassVar[str] = "bitsandbytes.optim.Lion8bit"

    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.99), description="Mix of gradient and momentum in the step, decay of the momentum."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decay of the weights, times the rate.")


class PagedLion8bit(Lion8bit):
    """Lion with state of 8 bits that moves to the CPU when the GPU is full."""

    path: ClassVar[str] = "bitsandbytes.optim.PagedLion8bit"


class AdEMAMix8bit(_Quantised):
    """AdEMAMix (Pagliardini et al. 2024): AdamW with a second, slow momentum; state of 8 bits."""

    path: ClassVar[str] = "bitsandbytes.optim.AdEMAMix8bit"

    betas: tuple[DecayRate, DecayRate, DecayRate] = Field(
        (0.9, 0.999, 0.9999), description="Decay of gradient, squared gradient and slow momentum."
    )
    alpha: float = Field(5.0, ge=0, description="DecayRate of the slow momentum.")
    t_alpha: int | None = Field(None, ge=1, description="Steps in which alpha rises to its value.")
    t_beta3: int | None = Field(None, ge=1, description="Steps in which the third beta rises.")
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.01, ge=0, description="Decay of the weights, times the rate.")


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """AdEMAMix with state of 8 bits that moves to the CPU when the GPU is full."""

    path: ClassVar[str] = "bitsandbytes.optim.PagedAdEMAMix8bit"


class SGDNesterov8bit(_Quantised):
    """Stochastic gradient descent with momentum of 8 bits, called as sd-scripts does.

    bitsandbytes has no Nesterov step: it takes the option and computes plain momentum.
    """

    path: ClassVar[str] = "bitsandbytes.optim.SGD8bit"

    momentum: float = Field(0.9, gt=0, lt=1, description="Decay of the momentum.")
    weight_decay: float = Field(0.0, ge=0, description="Times the weights, added to the gradient.")
