"""The options of each algorithm, and which of them go together.

lycoris-lora swallows what it does not know and what has no effect; here both are refused.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from sdxl_train import Field, Network, Problem, quiet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train import Adapter, LoadedModel, RunConfig

DEFAULT_RANK = 4
"""LyCORIS's rank where none is given."""
LINEAR_PRESETS = frozenset({"full-lin", "attn-mlp", "attn-only", "unet-transformer-only"})
"""Presets that leave out convolutions larger than 1x1."""

Preset = Literal[
    "full",
    "full-lin",
    "attn-mlp",
    "attn-only",
    "unet-only",
    "unet-transformer-only",
    "unet-convblock-only",
]


@dataclass(frozen=True)
class Fault:
    """Options that contradict each other, or one that nothing would read."""

    option: str
    message: str
    remedy: str


class LycorisNetwork(Network):
    """What all algorithms of LyCORIS have in common. Not a network of its own."""

    preset: Preset = Field("full", description="Which layers to adapt, as LyCORIS defines it.")
    conv_dim: int | None = Field(
        None,
        ge=0,
        description="Rank of convolutions larger than 1x1; 0 leaves them out. "
        "Default: network_dim.",
    )
    conv_alpha: float | None = Field(
        None, ge=0, description="Their alpha; 0 means their rank. Default: network_alpha."
    )
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
    use_scalar: bool = Field(
        False,
        description="Start from a learned factor of 0 and random matrices, "
        "instead of a matrix of zeros.",
    )
    rs_lora: bool = Field(
        False, description="Scale by alpha/sqrt(rank) instead of alpha/rank (rank-stabilized)."
    )
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
    bypass_mode: bool | None = Field(
        None,
        description="Apply the factors to the activations, instead of the delta weight that "
        "they make. Default: where it computes the same with less.",
    )

    algorithm: ClassVar[str]

    @property
    def rank(self) -> int:
        """Rank of linear layers and 1x1 convolutions."""
        return self.network_dim or DEFAULT_RANK

    @property
    def conv_rank(self) -> int:
        """Rank of larger convolutions; 0 leaves them out."""
        return self.rank if self.conv_dim is None else self.conv_dim

    @property
    def own_conv_alpha(self) -> float:
        """Alpha of larger convolutions; 0 means their rank."""
        return self.network_alpha if self.conv_alpha is None else self.conv_alpha

    @property
    def delta_dropout(self) -> float:
        """Dropout of what the delta adds to a layer's output."""
        return self.dropout or self.network_dropout or 0.0

    @property
    def decomposes(self) -> bool:
        """Whether DoRA is asked for, under either name."""
        return self.dora_wd or self.weight_decompose

    @property
    @abstractmethod
    def module_options(self) -> dict[str, Any]:
        """Arguments of the library's module that only this algorithm has."""

    def args(self) -> str:
        """Give the algorithm and what was set, as JSON of strings, as ``ss_network_args``."""
        own = [name for name in self.model_fields_set if name not in Network.model_fields]
        return json.dumps(
            {"algo": self.algorithm} | {name: str(getattr(self, name)) for name in sorted(own)}
        )

    def build(self, model: LoadedModel) -> Adapter:
        """Attach the network to every part that trains."""
        # LyCORIS looks for bitsandbytes, which has opinions about the machine.
        with quiet("bitsandbytes"):
            from sdxl_train_lycoris.adapter import LycorisAdapter

        return LycorisAdapter(model, self)

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Yield the options that would have no effect or contradict each other."""
        for fault in self.faults():
            yield Problem(
                place=config.place(f"network_args.{fault.option}"),
                message=fault.message,
                remedy=fault.remedy,
            )

    def faults(self) -> Iterator[Fault]:
        """Yield what is wrong with the combination of options."""
        given = self.model_fields_set
        if {"dropout", "network_dropout"} <= given and self.dropout != self.network_dropout:
            yield Fault(
                "dropout",
                f"{self.dropout} contradicts --network_dropout {self.network_dropout}: "
                "they are one option",
                "give one of them",
            )
        if {"dora_wd", "weight_decompose"} <= given and self.dora_wd != self.weight_decompose:
            yield Fault(
                "weight_decompose", "contradicts dora_wd: they are one option", "give one of them"
            )
        if self.rank_dropout_scale and not self.rank_dropout:
            yield Fault(
                "rank_dropout_scale", "has no effect without rank_dropout", "set rank_dropout"
            )
        yield from self._dora_faults()
        yield from self._convolution_faults()

    def _dora_faults(self) -> Iterator[Fault]:
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

    def _convolution_faults(self) -> Iterator[Fault]:
        options = [name for name in ("conv_dim", "conv_alpha", "use_tucker") if self._asks(name)]
        if self.preset in LINEAR_PRESETS:
            reason, remedy = f"preset {self.preset} leaves them out", "leave it out, or preset=full"
        elif self.conv_dim == 0:
            reason, remedy = "conv_dim=0 leaves them out", "leave it out, or conv_dim=4"
            options.remove("conv_dim")
        else:
            return
        for option in options:
            yield Fault(option, f"is about convolutions larger than 1x1, and {reason}", remedy)

    def _asks(self, name: str) -> bool:
        """Tell whether an option was given and is not a switch that is off."""
        return name in self.model_fields_set and getattr(self, name) is not False


class TuckerOptions(LycorisNetwork):
    """What the algorithms have that can decompose the kernel of a convolution."""

    use_tucker: bool = Field(
        False,
        description="Give the kernel of a convolution a factor of its own. diffusers and "
        "sd-scripts cannot read such a LoCon.",
    )

    @property
    def module_options(self) -> dict[str, Any]:
        """Arguments of the library's module that only this algorithm has."""
        return {"use_tucker": self.use_tucker}


class KroneckerOptions(LycorisNetwork):
    """What LoKr alone has."""

    factor: int = Field(
        -1,
        ge=-1,
        description="Size of the first Kronecker factor, at most; -1: as square as it can be.",
    )
    decompose_both: bool = Field(False, description="Low rank for the first factor too.")
    full_matrix: bool = Field(False, description="No low rank: train both factors whole.")
    unbalanced_factorization: bool = Field(
        False, description="Exchange the roles of the output's two divisors."
    )

    @property
    def module_options(self) -> dict[str, Any]:
        """Arguments of the library's module that only this algorithm has."""
        return {
            "factor": self.factor,
            "decompose_both": self.decompose_both,
            "full_matrix": self.full_matrix,
            "unbalanced_factorization": self.unbalanced_factorization,
        }


class Lora(TuckerOptions):
    """LoRA (Hu et al. 2022) as LyCORIS does it: on convolutions too, then called LoCon."""

    algorithm: ClassVar[str] = "lora"

    def faults(self) -> Iterator[Fault]:
        """Yield what is wrong with the combination of options."""
        yield from super().faults()
        if self.bypass_mode and self.rank_dropout_scale:
            yield Fault(
                "rank_dropout_scale",
                "goes not with bypass_mode, which drops ranks: once all are dropped it divides "
                "by zero",
                "leave one of them out",
            )


class Loha(TuckerOptions):
    """LoHa: the delta is the Hadamard product of two low-rank matrices (Hyeon-Woo et al. 2022)."""

    algorithm: ClassVar[str] = "loha"


class Lokr(KroneckerOptions):
    """LoKr: the delta is the Kronecker product of two factors (Yeh et al. 2024)."""

    algorithm: ClassVar[str] = "lokr"

    def faults(self) -> Iterator[Fault]:
        """Yield what is wrong with the combination of options."""
        yield from super().faults()
        if self.factor == 0:
            yield Fault("factor", "0 is not a size", "write -1 or a number >= 1")
        if self.bypass_mode and self.rank_dropout:
            yield Fault(
                "rank_dropout",
                "goes not with bypass_mode, which never makes the rows to drop",
                "leave one of them out",
            )
        if self.full_matrix:
            for option in ("decompose_both", "rs_lora"):
                if getattr(self, option):
                    yield Fault(
                        option,
                        "has no effect with full_matrix, which has no rank",
                        "leave one of them out",
                    )


ALGORITHMS: dict[str, type[LycorisNetwork]] = {
    "lora": Lora,
    "locon": Lora,
    "loha": Loha,
    "lokr": Lokr,
}


def _lowered(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class Kohya(TuckerOptions, KroneckerOptions):
    """LyCORIS as sd-scripts names it: any of the algorithms, by ``algo``."""

    algo: Annotated[Literal["lora", "locon", "loha", "lokr"], BeforeValidator(_lowered)] = Field(
        "lora", description="Algorithm; lora and locon are the same."
    )

    @property
    def chosen(self) -> LycorisNetwork:
        """The options of the algorithm alone."""
        network = ALGORITHMS[self.algo]
        given = self.model_fields_set & network.model_fields.keys()
        return network(**{name: getattr(self, name) for name in given})

    def build(self, model: LoadedModel) -> Adapter:
        """Attach the chosen algorithm to every part that trains."""
        return self.chosen.build(model)

    def faults(self) -> Iterator[Fault]:
        """Yield what is wrong with the options, and those that the algorithm does not have."""
        yield from self.chosen.faults()
        known = ALGORITHMS[self.algo].model_fields.keys()
        for option in sorted(self.model_fields_set - known - {"algo"}):
            owners = [name for name, kind in ALGORITHMS.items() if option in kind.model_fields]
            yield Fault(
                option,
                f"is not an option of algo={self.algo}, only of {', '.join(owners)}",
                "leave it out, or choose another algo",
            )
