"""Options of a model that trade memory for speed, and what can be wrong with them.

Light to import.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sdxl_train.components import Model
from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.config import RunConfig

Attention = Literal["lean", "xformers", "sdpa", "explicit"]


class MemoryOptions(Model):
    """What of a model is stored how, and how it is computed with."""

    may_change: ClassVar[frozenset[str]] = Model.may_change | {
        "cpu_offload_checkpointing",
        "lowram",
        "highvram",
        "disable_mmap_load_safetensors",
    }

    sdpa: bool = Field(
        True,
        description="Compute attention with torch's scaled_dot_product_attention; false: by an "
        "explicit softmax (slower, more memory).",
    )
    mem_eff_attn: bool = Field(
        False,
        description="Compute the U-Net's attention only with those of torch's kernels that never "
        "hold the whole matrix. Wins over xformers and sdpa.",
    )
    xformers: bool = Field(
        False, description="Compute the U-Net's attention with xformers. Wins over sdpa."
    )
    fp8_base: bool = Field(
        False,
        description="Store the frozen weights of U-Net and text encoders in 8 bits (float8), and "
        "compute in the precision of the run.",
    )
    fp8_base_unet: bool = Field(False, description="The same for the U-Net alone.")
    cpu_offload_checkpointing: bool = Field(
        False,
        description="With gradient_checkpointing: keep on the CPU what is kept for the backward "
        "pass.",
    )
    torch_compile: bool = Field(
        False, description="Compile the transformer blocks of the U-Net at their first use."
    )
    dynamo_backend: str = Field(
        "inductor", description="Compiler of torch_compile: inductor, eager, aot_eager, ..."
    )
    lowram: bool = Field(
        False,
        description="For sd-scripts' users: weights always go from the file to the device.",
    )
    highvram: bool = Field(
        False, description="Keep the device memory of freed encoders for this process."
    )
    disable_mmap_load_safetensors: bool = Field(
        False,
        description="Read a model file into memory as a whole, instead of mapping it: faster from "
        "network drives.",
    )

    @property
    def attention(self) -> Attention:
        """How the U-Net's attention is computed; sd-scripts has the same precedence."""
        if self.mem_eff_attn:
            return "lean"
        if self.xformers:
            return "xformers"
        return "sdpa" if self.sdpa else "explicit"

    def memory_problems(self, config: RunConfig) -> Iterator[Problem]:
        """Yield which of these options cannot have their effect."""
        if self.attention == "xformers" and find_spec("xformers") is None:
            yield Problem(
                place=config.place("xformers"),
                message="needs the package xformers, which is not installed",
                remedy="pip install xformers, or leave it out: the default, sdpa, has the same "
                "kernels",
            )
        if self.cpu_offload_checkpointing and not self.gradient_checkpointing:
            yield Problem(
                place=config.place("cpu_offload_checkpointing"),
                message="has no effect without --gradient_checkpointing",
                remedy="add --gradient_checkpointing, or leave it out",
            )
        if "dynamo_backend" in self.model_fields_set and not self.torch_compile:
            yield Problem(
                place=config.place("dynamo_backend"),
                message="has no effect without --torch_compile",
                remedy="add --torch_compile, or leave it out",
            )

    def memory_remarks(self, config: RunConfig) -> Iterator[str]:
        """Yield which of these options do nothing."""
        losers = {
            "lean": ("xformers", "sdpa"),
            "xformers": ("sdpa",),
        }.get(self.attention, ())
        winner = "mem_eff_attn" if self.attention == "lean" else "xformers"
        for name in losers:
            if getattr(self, name) and config.is_set(name):
                yield f"{config.place(name)} has no effect: {config.place(winner)} wins over it"
        if self.fp8_base and self.fp8_base_unet:
            yield (
                f"{config.place('fp8_base_unet')} has no effect: {config.place('fp8_base')} "
                f"includes the U-Net"
            )
        if self.lowram:
            yield (
                f"{config.place('lowram')} has no effect: weights are always read part by part "
                f"and go straight to the device"
            )
