"""The options that the networks have in common."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, ClassVar

from sdxl_lora_plugins.networks.blocks import (
    BlockAlphas,
    BlockFactors,
    BlockRanks,
    MiddleFactors,
    factors_by_block,
    values_by_block,
)
from sdxl_lora_plugins.networks.rules import Rules  # noqa: TC001 - pydantic reads the annotations
from sdxl_train import Field, LimitedNetwork, Network, Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from sdxl_train import RunConfig

_log = logging.getLogger(__name__)

DEFAULT_RANK = 4
"""sd-scripts' rank where none is given."""
RATES_BY_BLOCK = {"down_lr_weight": "input", "mid_lr_weight": "middle", "up_lr_weight": "output"}
"""Options with factors of learning rates, by the words that their blocks begin with."""
CONVOLUTION_RANKS = ("conv_dim", "conv_alpha")
RANKS_BY_BLOCK = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
VALUES_BY_BLOCK = (*RANKS_BY_BLOCK, *RATES_BY_BLOCK)


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
        description="Rank of each block of the U-Net (SDXL has 23), or of named ones: "
        "input_4=8,middle=16,output_*=4; 0 leaves a block out.",
    )
    block_alphas: BlockAlphas | None = Field(
        None, description="Alpha of each block of the U-Net; 0 means the rank."
    )
    conv_block_dims: BlockRanks | None = Field(
        None, description="Like block_dims, for convolutions larger than 1x1."
    )
    conv_block_alphas: BlockAlphas | None = Field(
        None, description="Like block_alphas, for convolutions larger than 1x1."
    )
    down_lr_weight: BlockFactors | None = Field(
        None,
        description="Factors of the learning rate for the blocks down: numbers, missing ones "
        "are 1, or cosine, sine, linear, reverse_linear or zeros, with +X to add to all. "
        "0 leaves a block out.",
    )
    mid_lr_weight: MiddleFactors | None = Field(
        None, description="Factors for the blocks in the middle: numbers, missing ones are 1."
    )
    up_lr_weight: BlockFactors | None = Field(
        None, description="Factors for the blocks up, as in down_lr_weight."
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
        return bool(self.conv_rank or asks(self.conv_block_dims))

    @property
    def has_lr_by_block(self) -> bool:
        """Whether blocks have learning rates of their own."""
        return any(getattr(self, name) is not None for name in RATES_BY_BLOCK)

    def by_block(self, names: Sequence[str]) -> ValuesByBlock:
        """Give what the options say of each block of a U-Net, or of a part without blocks.

        Raises:
            ValueError: If they are about other blocks.
        """
        return ValuesByBlock(self, names, options=VALUES_BY_BLOCK if names else ())

    def rank_and_alpha(
        self, block: str | None, values: ValuesByBlock, *, has_kernel: bool
    ) -> tuple[int, float]:
        """Give rank, 0 for none, and alpha, 0 for the rank, of a layer.

        Args:
            block: Its block of the U-Net; None for text encoders, and for layers in no block.
            values: What the options say of blocks.
            has_kernel: Whether it is a convolution larger than 1x1.
        """
        rank, alpha = self.rank, self.network_alpha
        if has_kernel:
            rank = self.conv_rank
            default = self.network_alpha if self.convolutional else 1.0
            alpha = default if self.conv_alpha is None else self.conv_alpha
        own_rank = values.get("conv_block_dims" if has_kernel else "block_dims", block)
        own_alpha = values.get("conv_block_alphas" if has_kernel else "block_alphas", block)
        return (
            rank if own_rank is None else int(own_rank),
            alpha if own_alpha is None else own_alpha,
        )

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
        yield from self._block_problems(config)
        for option, message, remedy in self._idle():
            if option in self.model_fields_set:
                is_flag = option in Network.model_fields
                place = config.place(option if is_flag else f"network_args.{option}")
                yield Problem(place=place, message=message, remedy=remedy)

    def _block_problems(self, config: RunConfig) -> Iterator[Problem]:
        """Yield values by block that are not for the blocks of this run's model."""
        for option in VALUES_BY_BLOCK:
            if getattr(self, option) is None:
                continue
            names = config.model.block_names()
            try:
                ValuesByBlock(self, names, options=[option])
            except ValueError as error:
                place = config.place(f"network_args.{option}")
                message = str(error) if names else "the base model's denoiser has no blocks"
                yield Problem(place=place, message=message)

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
        idle = () if denoiser else VALUES_BY_BLOCK
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


class ValuesByBlock:
    """What the options of a network say of each block of a U-Net.

    Args:
        network: The options.
        names: The blocks, in order.
        options: Those that are looked at.

    Raises:
        ValueError: If they are about other blocks.
    """

    def __init__(
        self, network: BlockNetwork, names: Sequence[str], *, options: Collection[str]
    ) -> None:
        self.names = tuple(names)
        self._threshold = network.block_lr_zero_threshold
        self._values: dict[str, dict[str, float | None]] = {}
        groups = tuple(RATES_BY_BLOCK.values())
        self._factors = {name: 1.0 for name in names if name.startswith(groups)}
        for option in options:
            value = getattr(network, option)
            if value is None:
                continue
            if option in RATES_BY_BLOCK:
                self._factors |= factors_by_block(value, names, RATES_BY_BLOCK[option])
            else:
                self._values[option] = values_by_block(value, names)

    def get(self, option: str, block: str | None) -> float | None:
        """Give the value of a block; None where nothing was said of it."""
        return None if block is None else self._values.get(option, {}).get(block)

    def lr_factor(self, block: str | None) -> float:
        """Give the factor of the learning rate of a block; 0 leaves it out."""
        if block is None or block not in self._factors:
            return 1.0
        factor = self._factors[block]
        return 0.0 if factor <= self._threshold else factor


def asks(value: object) -> bool:
    """Tell whether a value is more than nothing, or than leaving layers out."""
    if isinstance(value, dict):
        return any(value.values())
    return any(value) if isinstance(value, list) else bool(value)
