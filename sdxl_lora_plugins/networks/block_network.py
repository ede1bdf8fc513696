"""The options that the networks have in common."""

from __future__ import annotations

import logging
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
from sdxl_lora_plugins.networks.rules import Rules  # noqa: TC001 - pydantic reads the annotations
from sdxl_train import Field, LimitedNetwork, Network, Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train import RunConfig

_log = logging.getLogger(__name__)

DEFAULT_RANK = 4
"""sd-scripts' rank where none is given."""
RATES_BY_BLOCK = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
CONVOLUTION_RANKS = ("conv_dim", "conv_alpha")
RANKS_BY_BLOCK = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")


class BlockNetwork(LimitedNetwork):
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
        None,
        description="Rank of each of the 23 blocks of the U-Net, or of named ones: "
        "input_4=8,middle=16,output_*=4; 0 leaves a block out.",
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

    rules: Rules | None = Field(
        None,
        description="Rules by name, separated by ;, of which the last that matches a layer says "
        "everything about it: a regular expression, searched for in the layer's name in files, and "
        "include, exclude, dim=N, alpha=X or lr=X: 'attn2 dim=8 lr=1e-4; ff_net exclude'.",
    )
    dim_from_weights: bool = Field(
        False,
        json_schema_extra={"flag": True},
        description="Adapt the layers that network_weights has, with the rank and alpha of each.",
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
        own_rank = ranks[block] if ranks else None
        own_alpha = alphas[block] if alphas else None
        return (rank if own_rank is None else own_rank, alpha if own_alpha is None else own_alpha)

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
        if self.dim_from_weights and self.network_weights is None:
            yield Problem(
                place=config.place("dim_from_weights"),
                message="there is no file to take ranks from",
                remedy="name one with --network_weights",
            )
        for option, message, remedy in self._idle():
            if option in self.model_fields_set:
                is_flag = option in Network.model_fields
                place = config.place(option if is_flag else f"network_args.{option}")
                yield Problem(place=place, message=message, remedy=remedy)

    def remarks(self, config: RunConfig) -> Iterator[str]:
        """Say that the file decides on ranks."""
        for option in ("network_dim", "network_alpha"):
            if self.dim_from_weights and config.is_set(option):
                yield (
                    f"{config.place(option)} has no effect: {config.place('dim_from_weights')} "
                    "takes ranks and alphas from the file"
                )

    def require_parts(self, *, denoiser: bool, text_encoders: bool) -> None:
        """Refuse options by block of a U-Net that does not train; warn of idle LoRA+ ratios.

        sd-scripts' users leave those in their commands.

        Raises:
            UserError: With every one of them.
        """
        remedy = "leave it out, or train that part"
        idle = [] if denoiser else [*RANKS_BY_BLOCK, *RATES_BY_BLOCK]
        problems = [
            Problem(
                place=f"--network_args {name}",
                message="is about the U-Net, and no part of that trains",
                remedy=remedy,
            )
            for name in idle
            if name in self.model_fields_set and getattr(self, name) is not None
        ]
        if problems:
            raise UserError(problems)
        for name, trains in self.plus_options(denoiser=denoiser, text_encoders=text_encoders):
            if not trains and getattr(self, name) is not None:
                _log.warning("--network_args %s has no effect: no part of that trains", name)

    def plus_options(self, *, denoiser: bool, text_encoders: bool) -> list[tuple[str, bool]]:
        """Give LoRA+'s options of single parts, and whether such a part trains."""
        return []

    def _idle(self) -> Iterator[tuple[str, str, str]]:
        """Yield options that nothing would read, if they are given: name, reason and remedy."""
        if self.dim_from_weights:
            reason = "has no effect with dim_from_weights: the file has ranks and alphas"
            for option in (*CONVOLUTION_RANKS, *RANKS_BY_BLOCK, "rs_lora"):
                yield option, reason, "leave one of them out"
            if any(rule.dim or rule.include or rule.alpha is not None for rule in self.rules or ()):
                yield "rules", f"include, dim and alpha: {reason}", "leave these words out"
        if not self.adapts_convolutions:
            for option in ("conv_alpha", "conv_block_alphas"):
                yield option, "has no effect: no convolution is adapted", "set conv_dim"
        if not self.has_lr_by_block:
            remedy = f"set one of {', '.join(RATES_BY_BLOCK)}"
            yield "block_lr_zero_threshold", "has no effect without rates by block", remedy
