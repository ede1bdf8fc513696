"""The algorithms of LyCORIS: the options of each, and all of them under one name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from sdxl_train import Field
from sdxl_train_lycoris.blocks import plain_values
from sdxl_train_lycoris.options import (
    DoraOptions,
    FactorOptions,
    Fault,
    LycorisNetwork,
    RankOptions,
    ScaledOptions,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sdxl_train import Adapter, LoadedModel, RunConfig


_RANK_FLAGS = ("network_dim", "network_alpha")


class TuckerOptions(DoraOptions):
    """What the algorithms have that can decompose the kernel of a convolution."""

    use_tucker: bool = Field(
        False,
        description="Give the kernel of a convolution a factor of its own. diffusers and "
        "sd-scripts cannot read such a LoCon.",
    )
    use_cp: bool = Field(False, description="Older name of use_tucker.")
    use_conv_cp: bool = Field(False, description="Older name of use_tucker.")

    convolution_options: ClassVar[tuple[str, ...]] = (
        *DoraOptions.convolution_options,
        "use_tucker",
        "use_cp",
        "use_conv_cp",
    )

    @property
    def has_core(self) -> bool:
        """Whether larger kernels have a factor of their own, under any name."""
        return self.use_tucker or self.use_cp or self.use_conv_cp


class PlusOptions(LycorisNetwork):
    """LoRA+ (Hayou et al. 2024)."""

    loraplus_lr_ratio: float | None = Field(
        None, gt=0, description="LoRA+: factor of the learning rate of lora_up; 16 is common."
    )
    loraplus_unet_lr_ratio: float | None = Field(
        None, gt=0, description="The same for the U-Net, over loraplus_lr_ratio."
    )
    loraplus_text_encoder_lr_ratio: float | None = Field(
        None, gt=0, description="The same for the text encoders, over loraplus_lr_ratio."
    )

    def plus_ratio(self, *, is_denoiser: bool) -> float | None:
        """Give LoRA+'s ratio for the U-Net or for a text encoder."""
        own = self.loraplus_unet_lr_ratio if is_denoiser else self.loraplus_text_encoder_lr_ratio
        return self.loraplus_lr_ratio if own is None else own


class KroneckerOptions(DoraOptions):
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


class RotationOptions(RankOptions):
    """What the algorithms have that rotate outputs."""

    shrinks: ClassVar[bool] = False

    constraint: float = Field(
        0.0,
        ge=0,
        description="Largest rotation, for each output of a layer; 0: any. Files hold the "
        "rotation itself, since clients read a constraint differently.",
    )
    rescaled: bool = Field(False, description="Train a factor of each output too.")

    def idle_flags(self) -> dict[str, str]:
        """Give the flags of all networks that nothing reads."""
        return {"network_alpha": f"{self.algorithm} has no scale, only constraint"}


class Lora(TuckerOptions, PlusOptions):
    """LoRA (Hu et al. 2022) as LyCORIS does it: on convolutions too, then called LoCon."""

    algorithm: ClassVar[str] = "lora"


class Loha(TuckerOptions):
    """LoHa: the delta is the Hadamard product of two low-rank matrices (Hyeon-Woo et al. 2022)."""

    algorithm: ClassVar[str] = "loha"


class Lokr(KroneckerOptions):
    """LoKr: the delta is the Kronecker product of two factors (Yeh et al. 2024)."""

    algorithm: ClassVar[str] = "lokr"

    def idle_flags(self) -> dict[str, str]:
        """Give the flags of all networks that nothing reads."""
        reason = "with full_matrix there is no rank"
        return dict.fromkeys(_RANK_FLAGS, reason) if self.full_matrix else {}

    def faults(self) -> Iterator[Fault]:
        """Yield what is wrong with the combination of options."""
        yield from super().faults()
        if self.factor == 0:
            yield Fault("factor", "0 is not a size", "write -1 or a number >= 1")
        if self.full_matrix:
            for option in ("decompose_both", "rs_lora"):
                if getattr(self, option):
                    yield Fault(
                        option,
                        "has no effect with full_matrix, which has no rank",
                        "leave one of them out",
                    )


class Dylora(ScaledOptions):
    """DyLoRA: LoRA whose ranks are trained so that it can be cut (Valipour et al. 2022).

    Each step trains one block of ranks, beside those below it. A file is a LoRA of the whole rank.
    """

    algorithm: ClassVar[str] = "dylora"

    block_size: int = Field(4, ge=1, description="Ranks that train together; divides every rank.")

    def faults(self) -> Iterator[Fault]:
        """Yield the ranks that are no multiple of the block's size."""
        yield from super().faults()
        ranks: list[tuple[str, Sequence[float | None]]] = [
            ("network_dim", [self.rank]),
            ("conv_dim", [self.conv_rank]),
            ("block_dims", plain_values(self.block_dims)),
            ("conv_block_dims", plain_values(self.conv_block_dims)),
        ]
        for option, values in ranks:
            if odd := sorted({rank for rank in values if rank and rank % self.block_size}):
                if option == "conv_dim" and self.conv_dim is None:
                    continue
                yield Fault(
                    option,
                    f"{', '.join(map(str, odd))} is no multiple of block_size={self.block_size}",
                    "change one of them",
                )


class Glora(FactorOptions):
    """GLoRA: low-rank changes of the frozen weight and beside it (Chavan et al. 2023)."""

    algorithm: ClassVar[str] = "glora"


class Ia3(LycorisNetwork):
    """(IA)^3: a factor for each output of a layer, or each input (Liu et al. 2022)."""

    algorithm: ClassVar[str] = "ia3"

    train_on_input: bool = Field(False, description="A factor for each input instead.")

    def idle_flags(self) -> dict[str, str]:
        """Give the flags of all networks that nothing reads."""
        return dict.fromkeys(_RANK_FLAGS, "ia3 has no rank")


class DiagOft(RotationOptions):
    """Diag-OFT: blocks of a layer's outputs are rotated (Qiu et al. 2023).

    ``network_dim`` is the size of the blocks, or their number.
    """

    algorithm: ClassVar[str] = "diag-oft"


class Boft(RotationOptions):
    """BOFT: outputs are rotated by a product of butterfly factors (Liu et al. 2024).

    ``network_dim`` is the largest block; SDXL's sizes need at least 10.
    """

    algorithm: ClassVar[str] = "boft"


class Full(LycorisNetwork):
    """Whole weights and biases are trained; the file has their differences."""

    algorithm: ClassVar[str] = "full"

    def idle_flags(self) -> dict[str, str]:
        """Give the flags of all networks that nothing reads."""
        return dict.fromkeys(_RANK_FLAGS, "full has no rank")


ALGORITHMS: dict[str, type[LycorisNetwork]] = {
    "lora": Lora,
    "locon": Lora,
    "loha": Loha,
    "lokr": Lokr,
    "dylora": Dylora,
    "glora": Glora,
    "ia3": Ia3,
    "diag-oft": DiagOft,
    "boft": Boft,
    "full": Full,
}


def _lowered(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class Kohya(
    TuckerOptions, PlusOptions, KroneckerOptions, RotationOptions, Dylora, Glora, Ia3, Full
):
    """LyCORIS as sd-scripts names it: any of the algorithms, by ``algo``."""

    algo: Annotated[
        Literal[
            "lora", "locon", "loha", "lokr", "dylora", "glora", "ia3", "diag-oft", "boft", "full"
        ],
        BeforeValidator(_lowered),
    ] = Field("lora", description="Algorithm; lora and locon are the same.")

    @property
    def chosen(self) -> LycorisNetwork:
        """The options of the algorithm alone."""
        network = ALGORITHMS[self.algo]
        given = self.model_fields_set & network.model_fields.keys()
        return network(**{name: getattr(self, name) for name in given})

    def build(self, model: LoadedModel) -> Adapter:
        """Attach the chosen algorithm to every part that trains."""
        return self.chosen.build(model)

    def remarks(self, config: RunConfig) -> Iterator[str]:
        """Yield what the algorithm has to say."""
        yield from self.chosen.remarks(config)

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
