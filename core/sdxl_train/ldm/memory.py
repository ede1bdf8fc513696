"""Options of a model that trade memory for speed, and what can be wrong with them.

Light to import.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from sdxl_train.components import Model
from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.config import RunConfig

Attention = Literal["lean", "xformers", "sdpa", "explicit"]
DynamoMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
_WITH_GRAPHS = ("reduce-overhead", "max-autotune")
_GPU_ONLY = {
    "xformers": (
        "needs a GPU, and this run has none",
        "leave it out: the default, sdpa, has the same kernels",
    ),
    "dynamo_mode": (
        "replays CUDA graphs, and this run has no CUDA GPU",
        "leave it out, or use --dynamo_mode max-autotune-no-cudagraphs",
    ),
}
"""What is wrong with options that need a GPU, and what to do."""


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
    cpu_offload_checkpointing: bool = Field(
        False,
        description="With gradient_checkpointing: keep on the CPU what is kept for the backward "
        "pass.",
    )
    checkpoint_levels: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="With gradient_checkpointing: the levels of the U-Net that recompute, from 0, "
        "the finest. Default: all.",
    )
    channels_last: bool = Field(
        False,
        description="Keep the U-Net's convolutions and what they compute with the channels of a "
        "pixel side by side in memory.",
    )
    torch_compile: bool = Field(
        False, description="Compile the transformer blocks of the U-Net at their first use."
    )
    dynamo_backend: str = Field(
        "inductor", description="Compiler of torch_compile: inductor, eager, aot_eager, ..."
    )
    dynamo_mode: DynamoMode = Field(
        "default",
        description="What inductor aims at: reduce-overhead replays CUDA graphs, max-autotune does "
        "and tries out kernels.",
    )
    dynamo_use_dynamic: bool = Field(
        False,
        description="Compile once for images of every size, not for each size: slower steps, a "
        "sooner start with many buckets.",
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
        description="Read the model's files as any others, instead of mapping them: faster from "
        "network drives.",
    )

    @property
    def maps_files(self) -> bool:
        """Whether weights are views of their files where they can be."""
        return not self.disable_mmap_load_safetensors

    @property
    def reuses_memory(self) -> bool:
        """CUDA graphs write what they compute to the same memory each time."""
        return self.torch_compile and self.dynamo_mode in _WITH_GRAPHS

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
        for name in ("torch_compile", "channels_last"):
            if getattr(self, name) and config.processes.spreads_base:
                yield Problem(
                    place=config.place(name),
                    message="does not go with weights that are spread over processes (--fsdp, "
                    "--zero_stage 3)",
                    remedy="leave one of them out",
                )
        needed = {
            "cpu_offload_checkpointing": "gradient_checkpointing",
            "checkpoint_levels": "gradient_checkpointing",
            "dynamo_backend": "torch_compile",
            "dynamo_mode": "torch_compile",
            "dynamo_use_dynamic": "torch_compile",
        }
        for name, other in needed.items():
            is_set = name in self.model_fields_set and getattr(self, name) is not False
            if is_set and not getattr(self, other):
                yield Problem(
                    place=config.place(name),
                    message=f"has no effect without --{other}",
                    remedy=f"add --{other}, or leave it out",
                )
        if self.dynamo_mode != "default" and self.dynamo_backend != "inductor":
            yield Problem(
                place=config.place("dynamo_mode"),
                message=f"is for inductor, and {config.place('dynamo_backend')} is "
                f"{self.dynamo_backend}",
                remedy="leave one of them out",
            )

    def machine_problems(self, config: RunConfig) -> Iterator[Problem]:
        """Yield what needs a GPU where there is none."""
        needs = {
            "xformers": self.attention == "xformers",
            "dynamo_mode": self.reuses_memory,
        }
        for name, is_asked in needs.items():
            if is_asked and config.device().type != "cuda":
                yield Problem(
                    place=config.place(name), message=_GPU_ONLY[name][0], remedy=_GPU_ONLY[name][1]
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
        if self.lowram:
            yield (
                f"{config.place('lowram')} has no effect: weights are always read part by part "
                f"and go straight to the device"
            )
