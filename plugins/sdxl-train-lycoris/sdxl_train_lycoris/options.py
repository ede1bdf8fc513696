"""What LyCORIS's algorithms have in common, and which options go together.

lycoris-lora swallows what it does not know and what has no effect; here both are refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sdxl_train import Field, LimitedNetwork, Problem, UserError, quiet
from sdxl_train_lycoris.blocks import (
    BlockAlphas,
    BlockRanks,
    absent_blocks,
    plain_values,
    values_by_block,
)
from sdxl_train_lycoris.presets import BUILTIN_PRESETS, LINEAR_PRESETS, Preset, read_preset

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sdxl_train import Adapter, LoadedModel, RunConfig

DEFAULT_RANK = 4
"""LyCORIS's rank where none is given."""


@dataclass(frozen=True)
class Fault:
    """Options that contradict each other, or one that nothing would read."""

    option: str
    message: str
    remedy: str


class LycorisNetwork(LimitedNetwork):
    """What all algorithms of LyCORIS have in common. Not a network of its own."""

    algorithm: ClassVar[str]
    bypasses: ClassVar[bool] = False
    """Whether its factors can act without the delta weight that they make."""
    shrinks: ClassVar[bool] = True
    """Whether a delta has a norm that can be limited."""

    preset: str = Field(
        "full",
        description="Which layers to adapt: full, full-lin, attn-mlp, attn-only, unet-only, "
        "unet-transformer-only, unet-convblock-only or ia3, as LyCORIS defines them, or a TOML "
        "file. Default: full.",
    )
    train_norm: bool = Field(False, description="Train the norms in the blocks too.")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="The same as --network_dropout: drops outputs of the delta."
    )
    rank_dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability of dropping an output row of the delta weight."
    )
    rank_dropout_scale: bool = Field(
        False, description="Divide the rows that rank_dropout left by their share."
    )
    module_dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability of leaving a layer unadapted for a step."
    )
    bypass_mode: bool | None = Field(
        None,
        description="Apply the factors to the activations, instead of the delta weight that "
        "they make (lora, loha, lokr). Default: where it computes the same with less.",
    )
    use_reentrant: bool | None = Field(
        None, description="For sd-scripts' users; gradient checkpointing here is never reentrant."
    )

    @property
    def rank(self) -> int:
        """Rank of linear layers and 1x1 convolutions."""
        return self.network_dim or DEFAULT_RANK

    @property
    def delta_dropout(self) -> float:
        """Dropout of what the delta adds to a layer's output."""
        return self.dropout or self.network_dropout or 0.0

    @property
    def layers(self) -> Preset:
        """Which layers to adapt."""
        return read_preset(self.preset)

    @property
    def chosen(self) -> LycorisNetwork:
        """The options of the algorithm alone."""
        return self

    def idle_flags(self) -> dict[str, str]:
        """Give the flags of all networks that nothing reads, with the reason.

        They are no mistake: commands for LyCORIS have them whatever the algorithm.
        """
        return {}

    def plus_ratio(self, *, is_denoiser: bool) -> float | None:
        """Give how much faster the second factors of a part train; None for no difference."""
        return None

    def args(self) -> str:
        """Give the algorithm and what was set, as JSON of strings, as ``ss_network_args``."""
        own = {
            name: _written(getattr(self, name))
            for name in sorted(self.model_fields_set)
            if not _is_flag(name)
        }
        if "preset" in own:
            # Of a file only the name: where it lies is nobody's business.
            own["preset"] = Path(self.preset).name
        return json.dumps({"algo": self.algorithm} | own)

    def build(self, model: LoadedModel) -> Adapter:
        """Attach the network to every part that trains."""
        # LyCORIS looks for bitsandbytes, which has opinions about the machine.
        with quiet("bitsandbytes"):
            from sdxl_train_lycoris.adapter import LycorisAdapter

        return LycorisAdapter(model, self)

    def contents(self) -> Mapping[str, str]:
        """Give what a preset's file says, so that a resumed run may have it elsewhere."""
        if self.preset in BUILTIN_PRESETS:
            return {}
        said = self.layers.model_dump_json()
        return {"preset": f"a file of hash {sha256(said.encode()).hexdigest()[:16]}"}

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Yield the options that would have no effect or contradict each other."""
        try:
            faults = list(self.faults())
        except UserError as error:
            for problem in error.problems:
                place = config.place("network_args.preset")
                place = place if problem.place == "preset" else f"{place}, {problem.place}"
                yield Problem(place=place, message=problem.message, remedy=problem.remedy)
            return
        for fault in faults:
            option = fault.option
            yield Problem(
                place=config.place(option if _is_flag(option) else f"network_args.{option}"),
                message=fault.message,
                remedy=fault.remedy,
            )

    def remarks(self, config: RunConfig) -> Iterator[str]:
        """Yield what has no effect, though commands for LyCORIS are full of it."""
        if self.use_reentrant is not None:
            yield (
                f"{config.place('network_args.use_reentrant')} has no effect: gradient "
                "checkpointing is never reentrant here"
            )
        for option, reason in self.idle_flags().items():
            if config.is_set(option):
                yield f"{config.place(option)} has no effect: {reason}"

    def faults(self) -> Iterator[Fault]:
        """Yield what is wrong with the combination of options.

        Raises:
            UserError: If the preset is a file with something wrong.
        """
        preset = self.layers
        given = self.model_fields_set
        if {"dropout", "network_dropout"} <= given and self.dropout != self.network_dropout:
            yield Fault(
                "dropout",
                f"{self.dropout} contradicts --network_dropout {self.network_dropout}: "
                "they are one option",
                "give one of them",
            )
        if self.rank_dropout_scale and not self.rank_dropout:
            yield Fault(
                "rank_dropout_scale", "has no effect without rank_dropout", "set rank_dropout"
            )
        if self.bypass_mode and not self.bypasses:
            yield Fault("bypass_mode", f"{self.algorithm} has no such mode", "leave it out")
        if self.scale_weight_norms is not None and not self.shrinks:
            yield Fault(
                "scale_weight_norms",
                f"goes not with {self.algorithm}, whose rotations have no such norm",
                "use constraint",
            )
        yield from self._map_faults(preset)

    def _map_faults(self, preset: Preset) -> Iterator[Fault]:
        """Yield what is wrong with the options that a preset has for single layers."""
        from sdxl_train_lycoris.overrides import overridden

        for name, override in (*preset.module_algo_map.items(), *preset.name_algo_map.items()):
            try:
                overridden(self, override)
            except UserError as error:
                for problem in error.problems:
                    yield Fault("preset", f"{name}: {problem.message}", problem.remedy)

    def _asks(self, name: str) -> bool:
        """Tell whether an option was given and is not a switch that is off."""
        value = getattr(self, name)
        return name in self.model_fields_set and value is not None and value is not False


class RankOptions(LycorisNetwork):
    """What the algorithms have whose factors have a rank, or blocks a size."""

    conv_dim: int | None = Field(
        None,
        ge=0,
        description="Rank of convolutions larger than 1x1; 0 leaves them out. "
        "Default: network_dim.",
    )
    block_dims: BlockRanks | None = Field(
        None,
        description="Rank of each block of the U-Net (23 of SDXL; 25 values: of SD 1.x), or of "
        "named ones: input_4=8,middle=16,output_*=4; 0 leaves a block out.",
    )
    conv_block_dims: BlockRanks | None = Field(
        None, description="Like block_dims, for convolutions larger than 1x1."
    )

    convolution_options: ClassVar[tuple[str, ...]] = ("conv_dim", "conv_block_dims")
    block_options: ClassVar[tuple[str, ...]] = ("block_dims", "conv_block_dims")

    @property
    def conv_rank(self) -> int:
        """Rank of larger convolutions; 0 leaves them out."""
        return self.rank if self.conv_dim is None else self.conv_dim

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Yield what is wrong, values for blocks among it that the base model does not have."""
        yield from super().check(config)
        for option in self.block_options:
            values = getattr(self, option)
            if values is None:
                continue
            place, names = config.place(f"network_args.{option}"), config.model.block_names()
            if not names:
                message = "the base model's denoiser has no blocks"
                yield Problem(place=place, message=message, remedy="leave it out")
                continue
            try:
                values_by_block(values, names)
            except ValueError as error:
                yield Problem(place=place, message=str(error))

    def remarks(self, config: RunConfig) -> Iterator[str]:
        """Yield what has no effect: the blocks of SD 1.x that the base model lacks."""
        yield from super().remarks(config)
        for option in self.block_options:
            values = getattr(self, option)
            if values and (absent := absent_blocks(values, config.model.block_names())):
                yield (
                    f"{config.place(f'network_args.{option}')}: 25 values are those of SD 1.x; "
                    f"this U-Net has no {', '.join(absent)}, whose values have no effect"
                )

    def faults(self) -> Iterator[Fault]:
        """Yield what is wrong with the combination of options."""
        yield from super().faults()
        options = [name for name in self.convolution_options if self._asks(name)]
        if self.preset in LINEAR_PRESETS or not self.layers.enable_conv:
            reason, remedy = f"preset {self.preset} leaves them out", "leave it out, or preset=full"
        elif self.conv_dim == 0 and not any(plain_values(self.conv_block_dims)):
            reason, remedy = "conv_dim=0 leaves them out", "leave it out, or conv_dim=4"
            options.remove("conv_dim")
        else:
            return
        for option in options:
            yield Fault(option, f"is about convolutions larger than 1x1, and {reason}", remedy)


class ScaledOptions(RankOptions):
    """What the algorithms have whose delta is scaled by alpha/rank."""

    conv_alpha: float | None = Field(
        None, ge=0, description="Alpha of larger convolutions; 0: their rank. Default: "
        "network_alpha."
    )  # fmt: skip
    block_alphas: BlockAlphas | None = Field(
        None, description="Alpha of each of the blocks; 0 means the rank."
    )
    conv_block_alphas: BlockAlphas | None = Field(
        None, description="Like block_alphas, for convolutions larger than 1x1."
    )
    dim_from_weights: bool = Field(
        False,
        json_schema_extra={"flag": True},
        description="Adapt the layers that network_weights has, with the rank and alpha of each.",
    )

    convolution_options: ClassVar[tuple[str, ...]] = (
        *RankOptions.convolution_options,
        "conv_alpha",
        "conv_block_alphas",
    )
    block_options: ClassVar[tuple[str, ...]] = (
        *RankOptions.block_options,
        "block_alphas",
        "conv_block_alphas",
    )

    def remarks(self, config: RunConfig) -> Iterator[str]:
        """Yield what has no effect where a file says ranks."""
        yield from super().remarks(config)
        for option in ("network_dim", "network_alpha"):
            if self.dim_from_weights and config.is_set(option):
                yield (
                    f"{config.place(option)} has no effect: {config.place('dim_from_weights')} "
                    "takes ranks and alphas from the file"
                )

    def faults(self) -> Iterator[Fault]:
        """Yield what is wrong with the combination of options."""
        yield from super().faults()
        if not self.dim_from_weights:
            return
        if self.network_weights is None:
            yield Fault(
                "dim_from_weights",
                "there is no file to take ranks from",
                "name one with --network_weights",
            )
        ranks = {*ScaledOptions.convolution_options, *ScaledOptions.block_options}
        for option in sorted(ranks):
            if self._asks(option):
                yield Fault(
                    option,
                    "has no effect with dim_from_weights: the file has ranks and alphas",
                    "leave one of them out",
                )


class FactorOptions(ScaledOptions):
    """What the algorithms have that start at a factor of zero."""

    use_scalar: bool = Field(
        False,
        description="Start from a learned factor of 0 and random matrices, "
        "instead of a matrix of zeros.",
    )
    rs_lora: bool = Field(
        False,
        description="Scale by alpha/sqrt(rank) instead of alpha/rank; in files it is part of "
        "alpha, so every client reads it.",
    )

    def faults(self) -> Iterator[Fault]:
        """Yield what is wrong with the combination of options."""
        yield from super().faults()
        if self.dim_from_weights and self.rs_lora:
            yield Fault(
                "rs_lora",
                "has no effect with dim_from_weights: it is in the alphas of the file",
                "leave one of them out",
            )


class DoraOptions(FactorOptions):
    """Weight decomposition (Liu et al. 2024)."""

    bypasses: ClassVar[bool] = True

    dora_wd: bool = Field(
        False,
        description="Weight decomposition (DoRA). ComfyUI, A1111 and Forge read such files; "
        "diffusers and sd-scripts drop the decomposition.",
    )
    weight_decompose: bool = Field(False, description="Another name of dora_wd.")
    wd_on_output: bool = Field(
        False,
        description="Take DoRA's norm by output, as only LyCORIS itself reads it. "
        "Default: by input, as the image UIs do.",
    )

    @property
    def decomposes(self) -> bool:
        """Whether DoRA is asked for, under either name."""
        return self.dora_wd or self.weight_decompose

    def faults(self) -> Iterator[Fault]:
        """Yield what is wrong with the combination of options."""
        yield from super().faults()
        if {"dora_wd", "weight_decompose"} <= self.model_fields_set and (
            self.dora_wd != self.weight_decompose
        ):
            yield Fault(
                "weight_decompose", "contradicts dora_wd: they are one option", "give one of them"
            )
        if "wd_on_output" in self.model_fields_set and not self.decomposes:
            yield Fault("wd_on_output", "has no effect without dora_wd", "set dora_wd=True")
        if self.decomposes and self.bypass_mode:
            yield Fault(
                "bypass_mode",
                "goes not with dora_wd, which needs the delta weight",
                "leave one of them out",
            )
        if self.decomposes and self.delta_dropout:
            yield Fault(
                "dora_wd",
                "goes not with dropout: its delta scales the frozen weight too",
                "use rank_dropout or module_dropout",
            )


def _written(value: object) -> str:
    """Give the value of an option as text that is read as the same."""
    if isinstance(value, dict):
        return ",".join(f"{name}={number}" for name, number in value.items())
    return str(value)


def _is_flag(option: str) -> bool:
    return option in (*LimitedNetwork.model_fields, "dim_from_weights")
