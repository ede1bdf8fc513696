"""Networks: the options of each; what they build is in the module of its name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, ClassVar

from sdxl_lora_plugins.networks.block_network import (
    CONVOLUTION_RANKS,
    RANKS_BY_BLOCK,
    BlockNetwork,
    asks,
)
from sdxl_train import Field, Network, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train import Adapter, LoadedModel, RunConfig

__all__ = ["BlockNetwork", "Locon", "Lokr", "Lora"]


class Lora(BlockNetwork):
    """LoRA: low-rank deltas of attention and feed-forward layers (Hu et al. 2022)."""

    default: ClassVar[bool] = True

    loraplus_lr_ratio: float | None = Field(
        None, gt=0, description="LoRA+: factor of the learning rate of lora_up; 16 is common."
    )
    loraplus_unet_lr_ratio: float | None = Field(
        None, gt=0, description="The same for the U-Net, over loraplus_lr_ratio."
    )
    loraplus_text_encoder_lr_ratio: float | None = Field(
        None, gt=0, description="The same for the text encoders, over loraplus_lr_ratio."
    )
    rs_lora: bool = Field(
        False,
        description="Scale by alpha/sqrt(rank) instead of alpha/rank (rank-stabilized); in files "
        "it is part of alpha, so every client reads it.",
    )
    dora_wd: bool = Field(
        False,
        description="DoRA: train the norm of each input channel too. ComfyUI, A1111 and Forge read "
        "such files; diffusers and sd-scripts leave the norm out and LyCORIS fails. For those "
        "make a plain LoRA of the file with sdxl-train convert.",
    )

    def plus_options(self, *, denoiser: bool, text_encoders: bool) -> list[tuple[str, bool]]:
        """Give LoRA+'s options of single parts, and whether such a part trains."""
        return [
            ("loraplus_unet_lr_ratio", denoiser),
            ("loraplus_text_encoder_lr_ratio", text_encoders),
        ]

    def plus_ratio(self, *, is_denoiser: bool) -> float | None:
        """Give LoRA+'s ratio for the U-Net or for a text encoder."""
        own = self.loraplus_unet_lr_ratio if is_denoiser else self.loraplus_text_encoder_lr_ratio
        return self.loraplus_lr_ratio if own is None else own

    def build(self, model: LoadedModel) -> Adapter:
        """Attach LoRA to every part that trains."""
        from sdxl_lora_plugins.networks.lora import LoraAdapter

        return LoraAdapter(model, self)


class Locon(Lora):
    """LoCon: LoRA on the convolutions of the U-Net as well."""

    default: ClassVar[bool] = False
    convolutional: ClassVar[bool] = True


class Lokr(BlockNetwork):
    """LoKr: Kronecker products as deltas (Yeh et al. 2024), on convolutions too.

    ``network_dropout`` drops outputs of the delta.
    """

    convolutional: ClassVar[bool] = True

    factor: int = Field(
        -1,
        ge=-1,
        description="Size of the first Kronecker factor, at most; -1: as square as it can be.",
    )
    decompose_both: bool = Field(False, description="Low rank for the first factor too.")
    full_matrix: bool = Field(
        False, description="No low rank: train both factors whole, whatever rank and alpha."
    )

    def metadata(self) -> dict[str, str]:
        """Name the format as tools know it."""
        args = {
            name: str(getattr(self, name))
            for name in sorted(self.model_fields_set - Network.model_fields.keys())
        }
        return {
            "ss_network_module": "lycoris.kohya",
            "ss_network_args": json.dumps({"algo": "lokr", **args}),
        }

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Yield what is wrong with the factors, and the options that would have no effect."""
        yield from super().check(config)
        if self.factor == 0:
            yield Problem(
                place=config.place("network_args.factor"),
                message="0 is not a size",
                remedy="write -1 or a number >= 1",
            )

    def build(self, model: LoadedModel) -> Adapter:
        """Attach LoKr to every part that trains."""
        from sdxl_lora_plugins.networks.lokr import LokrAdapter

        return LokrAdapter(model, self)

    def _idle(self) -> Iterator[tuple[str, str, str]]:
        yield from super()._idle()
        if self.full_matrix:
            remedy = "leave one of them out"
            if self.decompose_both:
                yield "decompose_both", "contradicts full_matrix", remedy
            for option in ("network_dim", "network_alpha", *CONVOLUTION_RANKS, *RANKS_BY_BLOCK):
                if asks(getattr(self, option)):
                    yield option, "has no effect with full_matrix, which has no rank", remedy
            if any(rule.dim or rule.alpha for rule in self.rules or ()):
                yield "rules", "dim and alpha have no effect with full_matrix", "leave them out"
