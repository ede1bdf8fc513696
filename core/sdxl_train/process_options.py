"""Options of several processes, under sd-scripts' names; what they cannot mean here is said."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pydantic import Field

from sdxl_train.components import OptionModel
from sdxl_train.errors import Problem
from sdxl_train.launch import left_alone
from sdxl_train.options import Setting, Words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.config import RunConfig

_DEEPSPEED = (
    "deepspeed",
    "zero_stage",
    "offload_optimizer_device",
    "offload_optimizer_nvme_path",
    "offload_param_device",
    "offload_param_nvme_path",
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "fp16_master_weights_and_gradients",
)
_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
"""What accelerate's launcher sets for the engines that its configuration asks for."""

_CONFIGURATION = "accelerate's configuration"
_SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "mixed_precision": ({"mixed_precision": ""}, "no"),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": ""}, "1"),
    "dynamo_backend": ({"torch_compile": "true", "dynamo_backend": ""}, "no"),
    "dynamo_mode": ({"dynamo_mode": ""}, "default"),
    "dynamo_use_dynamic": ({"dynamo_use_dynamic": ""}, "false"),
    "use_cpu": ({"device": "cpu"}, "false"),
}
"""Settings of accelerate: the options that they set, to their own value or to the one that stands
here, and the value that says nothing."""
_OF_COMPILER = ("dynamo_mode", "dynamo_use_dynamic")
_UNUSED = {
    "dynamo_use_fullgraph": "false",
    "dynamo_use_regional_compilation": "false",
}


class ProcessOptions(OptionModel):
    """How several processes train together."""

    ddp_timeout: int | None = Field(
        None, ge=1, description="Minutes to wait for another process. Default: torch's, 30."
    )
    ddp_gradient_as_bucket_view: bool = Field(
        False,
        description="Let gradients lie in the summed tensor, and spare copying them back.",
    )
    ddp_static_graph: bool = Field(
        False,
        description="The same parts of the network have gradients in every step: find out which "
        "once. Not with module dropout.",
    )
    deepspeed: bool = Field(False, description="DeepSpeed, which is refused.")
    zero_stage: int | None = Field(None, description="Of DeepSpeed.")
    offload_optimizer_device: str | None = Field(None, description="Of DeepSpeed.")
    offload_optimizer_nvme_path: str | None = Field(None, description="Of DeepSpeed.")
    offload_param_device: str | None = Field(None, description="Of DeepSpeed.")
    offload_param_nvme_path: str | None = Field(None, description="Of DeepSpeed.")
    zero3_init_flag: bool = Field(False, description="Of DeepSpeed.")
    zero3_save_16bit_model: bool = Field(False, description="Of DeepSpeed.")
    fp16_master_weights_and_gradients: bool = Field(False, description="Of DeepSpeed.")

    def check(self, config: RunConfig, processes: int) -> Iterator[Problem]:
        """Refuse engines that spread what is not to be spread, and steps before the exchange."""
        remedy = "leave it out: without it, processes train together as docs/distributed.md says"
        reason = (
            "DeepSpeed is not supported: it spreads optimizer states, and a network's are small"
        )
        for name in _DEEPSPEED:
            if getattr(self, name) not in (None, False):
                yield Problem(place=config.place(name), message=reason, remedy=remedy)
        for variable, engine in _ENGINES.items():
            if os.environ.get(variable, "").lower() in ("1", "true"):
                yield Problem(
                    place=_CONFIGURATION,
                    message=f"asks for {engine}, which is not supported: only the network trains",
                    remedy="choose MULTI_GPU there, or pass --multi_gpu to accelerate launch",
                )
        if left_alone():
            yield Problem(
                place="accelerate launch",
                message="was asked for several processes, and started only this one, as it does "
                "where it finds fewer than two GPUs",
                remedy="add --multi_gpu (it works without GPUs too), or use torchrun "
                "--nproc_per_node N; if one process is what you want, unset MASTER_ADDR",
            )
        if config.training.fused_backward_pass and processes > 1:
            yield Problem(
                place=config.place("fused_backward_pass"),
                message=f"steps before the gradients of all {processes} processes can be added up",
                remedy="leave it out, or train with one process",
            )

    def remarks(self, config: RunConfig, processes: int) -> Iterator[str]:
        """Say what has no effect, and which of accelerate's settings this run does not follow."""
        for name in ("ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph"):
            if getattr(self, name) and processes == 1:
                yield f"{config.place(name)} has no effect with one process"
        options = config.options()
        for name, setting in accelerate_settings().items():
            used = str(options[name]["value"]).lower()
            if config.settings[name] != setting and used != str(setting.value):
                yield (
                    f"{setting.place} says {name} {setting.value}; what counts is "
                    f"{config.place(name)}, which says {used}"
                )
        for name, default in _UNUSED.items():
            value = os.environ.get(f"ACCELERATE_{name.upper()}", default).lower()
            if value != default:
                yield f"{_CONFIGURATION}'s {name} {value} has no effect: it is not offered here"
        for name in set(_OF_COMPILER) & _said().keys() - accelerate_settings().keys():
            yield f"{_CONFIGURATION}'s {name} has no effect without its dynamo_backend"


def accelerate_settings() -> dict[str, Setting]:
    """Give what accelerate's launcher says, as options; the user's own come before them."""
    said = _said()
    idle = () if "torch_compile" in said else _OF_COMPILER
    return {
        option: Setting(value=Words((value,)), place=_CONFIGURATION, origin=_CONFIGURATION)
        for option, value in said.items()
        if option not in idle
    }


def _said() -> dict[str, str]:
    said: dict[str, str] = {}
    for name, (options, idle) in _SETTINGS.items():
        value = os.environ.get(f"ACCELERATE_{name.upper()}", idle).lower()
        if value != idle:
            said |= {option: fixed or value for option, fixed in options.items()}
    return said
