"""Networks: the options of each; what they build is in the module of its name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, ClassVar

from sdxl_lora_plugins.networks.blocks import (
    BLOCKS,
    NUM_DOWN,
    NUM_MID,
    BlockAlphas,
    BlockRanks,
    NineFactors,
    ThreeFactors,
)
from sdxl_train import Field, Network, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train import Adapter, LoadedModel, RunConfig

__all__ = ["BlockNetwork", "Locon", "Lokr", "Lora"]

DEFAULT_RANK = 4
"""sd-scripts' rank where none is given."""
RATES_BY_BLOCK = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")


class BlockNetwork(Network):
    """What the networks have in common: which layers, and how by block. Not a network itself.

    Options by block are about the U-Net; text encoders have ``network_dim`` and ``network_alpha``.
    """

    convolutional: ClassVar[bool] = False
    """Whether convolutions are adapted unless ``conv_dim`` is 0, or only if it is given."""

    conv_dim: int | None = Field(
        None,
        ge=0,
        description="Rank of convolutions larger than 1x1; other layers of resnets then have "
        "network_dim. 0 leaves all of these out. Default: for lora 0, else network_dim.",
    )
    conv_alpha: float | None = Field(
        None,
        ge=0,
        description="Their alpha; 0 means their rank. Default: for lora 1, else network_alpha.",
    )
    rank_dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability of dropping a whole rank (lokr: an output)."
    )
    module_dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability of leaving a layer unadapted for a step."
    )
    block_dims: BlockRanks | None = Field(
        None, description="Rank of each of the 23 blocks of the U-Net; 0 leaves a block out."
    )
    block_alphas: BlockAlphas | None = Field(
        None, description="Alpha of each of the 23 blocks; 0 means the rank."
    )
    conv_block_dims: BlockRanks | None = Field(
        None, description="Like block_dims, for convolutions larger than 1x1."
    )
    conv_block_alphas: BlockAlphas | None = Field(
        None, description="Like block_alphas, for convolutions larger than 1x1."
    )
    down_lr_weight: NineFactors | None = Field(
        None,
        description="Factors of the learning rate for the 9 blocks down: numbers, missing ones "
        "are 1, or cosine, sine, linear, reverse_linear or zeros, with +X to add to all. "
        "0 leaves a block out.",
    )
    mid_lr_weight: ThreeFactors | None = Field(
        None, description="Factors for the 3 blocks in the middle: numbers, missing ones are 1."
    )
    up_lr_weight: NineFactors | None = Field(
        None, description="Factors for the 9 blocks up, as in down_lr_weight."
    )
    block_lr_zero_threshold: float = Field(
        0.0, ge=0, description="Factors up to this one count as 0."
    )

    @property
    def rank(self) -> int:
        """Rank where nothing else is said."""
        return self.network_dim or DEFAULT_RANK

    @property
    def conv_rank(self) -> int:
        """Rank of larger convolutions where nothing else is said; 0 leaves them out."""
        if self.conv_dim is None:
            return self.rank if self.convolutional else 0
        return self.conv_dim

    @property
    def adapts_convolutions(self) -> bool:
        """Whether resnets, downsamplers and upsamplers are adapted."""
        return bool(self.conv_rank or any(self.conv_block_dims or ()))

    @property
    def has_lr_by_block(self) -> bool:
        """Whether blocks have learning rates of their own."""
        return any(getattr(self, name) is not None for name in RATES_BY_BLOCK)

    def rank_and_alpha(self, block: int | None, *, has_kernel: bool) -> tuple[int, float]:
        """Give rank, 0 for none, and alpha, 0 for the rank, of a layer.

        Args:
            block: Index of its block of the U-Net; None for text encoders.
            has_kernel: Whether it is a convolution larger than 1x1.
        """
        ranks, alphas = self.block_dims, self.block_alphas
        rank, alpha = self.rank, self.network_alpha
        if has_kernel:
            ranks, alphas, rank = self.conv_block_dims, self.conv_block_alphas, self.conv_rank
            default = self.network_alpha if self.convolutional else 1.0
            alpha = default if self.conv_alpha is None else self.conv_alpha
        if block is None:
            return rank, alpha
        return (ranks[block] if ranks else rank, alphas[block] if alphas else alpha)

    def lr_factor(self, block: int | None) -> float:
        """Give the factor of the learning rate of a block; 0 leaves it out."""
        if block is None or block in (0, len(BLOCKS) - 1):
            return 1.0
        first_up = 1 + NUM_DOWN + NUM_MID
        if block < 1 + NUM_DOWN:
            factors, position = self.down_lr_weight, block - 1
        elif block < first_up:
            factors, position = self.mid_lr_weight, block - 1 - NUM_DOWN
        else:
            factors, position = self.up_lr_weight, block - first_up
        factor = factors[position] if factors else 1.0
        return 0.0 if factor <= self.block_lr_zero_threshold else factor

    def plus_ratio(self, *, is_denoiser: bool) -> float | None:
        """Give how much faster the second factors of a part train; None for no difference."""
        return None

    def metadata(self) -> dict[str, str]:
        """Describe the network for the header of files, beyond rank and alpha."""
        return {}

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Yield the options that would have no effect."""
        for option, message, remedy in self._idle():
            if option in self.model_fields_set:
                yield Problem(
                    place=config.place(f"network_args.{option}"), message=message, remedy=remedy
                )

    def _idle(self) -> Iterator[tuple[str, str, str]]:
        """Yield options that nothing would read, if they are given: name, reason and remedy."""
        if not self.adapts_convolutions:
            for option in ("conv_alpha", "conv_block_alphas"):
                yield option, "has no effect: no convolution is adapted", "set conv_dim"
        if not self.has_lr_by_block:
            remedy = f"set one of {', '.join(RATES_BY_BLOCK)}"
            yield "block_lr_zero_threshold", "has no effect without rates by block", remedy


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
        "such files; diffusers and sd-scripts leave the norm out and LyCORIS fails.",
    )

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
    full_matrix: bool = Field(False, description="No low rank: train both factors whole.")

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
        if self.full_matrix and self.decompose_both:
            yield "decompose_both", "contradicts full_matrix", "leave one of them out"
