"""Options of several processes, under sd-scripts' names; what they cannot mean here is said."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pydantic import Field

from sdxl_train.engine_options import EngineOptions
from sdxl_train.errors import Problem
from sdxl_train.launch import left_alone
from sdxl_train.options import Setting, Words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.config import RunConfig

ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "deepspeed",
    "ACCELERATE_USE_FSDP": "fsdp",
}
"""What accelerate's launcher sets for the engines that its configuration asks for: the options."""
_FOREIGN_ENGINES = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}

_CONFIGURATION = "accelerate's configuration"
_SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "ACCELERATE_MIXED_PRECISION": ({"mixed_precision": ""}, "no"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ({"gradient_accumulation_steps": ""}, "1"),
    "ACCELERATE_DYNAMO_BACKEND": ({"torch_compile": "true", "dynamo_backend": ""}, "no"),
    "ACCELERATE_DYNAMO_MODE": ({"dynamo_mode": ""}, "default"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": ({"dynamo_use_dynamic": ""}, "false"),
    "ACCELERATE_USE_CPU": ({"device": "cpu"}, "false"),
    "ACCELERATE_USE_DEEPSPEED": ({"deepspeed": "true"}, "false"),
    "ACCELERATE_GRADIENT_CLIPPING": ({"max_grad_norm": ""}, "auto"),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ({"zero_stage": ""}, "2"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ({"offload_optimizer_device": ""}, "none"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ({"offload_param_device": ""}, "none"),
    "ACCELERATE_USE_FSDP": ({"fsdp": "true"}, "false"),
    "FSDP_OFFLOAD_PARAMS": ({"offload_param_device": "cpu"}, "false"),
}
"""Settings of accelerate: the options that they set, to their own value or to the one that stands
here, and the value that says nothing."""
_OF_COMPILER = ("dynamo_mode", "dynamo_use_dynamic")
_UNUSED = {
    "dynamo_use_fullgraph": "false",
    "dynamo_use_regional_compilation": "false",
}


class ProcessOptions(EngineOptions):
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

    def check(self, config: RunConfig, processes: int) -> Iterator[Problem]:
        """Refuse engines that cannot do what is asked of them, and steps before the exchange."""
        yield from self.engine_problems(config)
        for variable, engine in _FOREIGN_ENGINES.items():
            if _asked(variable):
                yield Problem(
                    place=_CONFIGURATION,
                    message=f"asks for {engine}, which is not supported: only the network trains",
                    remedy="choose MULTI_GPU there, or pass --multi_gpu to accelerate launch",
                )
        if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ:
            yield Problem(
                place=_CONFIGURATION,
                message="names a configuration file of DeepSpeed, which is not read",
                remedy="set zero_stage and offload_optimizer_device there, or as flags here",
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
        alone = {
            "ddp_timeout": self.ddp_timeout,
            "ddp_gradient_as_bucket_view": self.ddp_gradient_as_bucket_view,
            "ddp_static_graph": self.ddp_static_graph,
            "fsdp": self.fsdp,
        }
        for name, is_set in alone.items():
            if is_set and processes == 1:
                place = config.place(name)
                said = f"{place}'s use_{name}" if place == _CONFIGURATION else place
                yield f"{said} has no effect with one process"
        exchange = ("ddp_gradient_as_bucket_view", "ddp_static_graph")
        for name in exchange if self.deepspeed else ():
            if getattr(self, name):
                yield f"{config.place(name)} has no effect with --deepspeed, which sends gradients"
        options = config.options()
        for name, setting in accelerate_settings().items():
            used = str(options[name]["value"]).lower()
            if config.settings[name] != setting and used != str(setting.value):
                yield (
                    f"{setting.place} says {name} {setting.value}; what counts is "
                    f"{config.place(name)}, which says {used}"
                )
        if self.fsdp and _asked("ACCELERATE_USE_FSDP"):
            yield (
                f"{_CONFIGURATION} asks for FSDP: --fsdp spreads the frozen weights by blocks; of "
                f"FSDP's further settings there fsdp_offload_params alone has an effect"
            )
        for name in ("ZERO3_INIT", "ZERO3_SAVE_16BIT_MODEL"):
            if self.zero_stage == 3 and _asked(f"ACCELERATE_DEEPSPEED_{name}"):
                yield (
                    f"{_CONFIGURATION}'s {name.lower()} has no effect: the base model is mapped "
                    f"from its file, and networks are saved whole"
                )
        for name, default in _UNUSED.items():
            value = os.environ.get(f"ACCELERATE_{name.upper()}", default).lower()
            if value != default:
                yield f"{_CONFIGURATION}'s {name} {value} has no effect: it is not offered here"
        for name in set(_OF_COMPILER) & _said().keys() - accelerate_settings().keys():
            yield f"{_CONFIGURATION}'s {name} has no effect without its dynamo_backend"


def _asked(variable: str) -> bool:
    """Tell whether accelerate's launcher says yes to something."""
    return os.environ.get(variable, "").lower() in ("1", "true")


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
    for variable, (options, idle) in _SETTINGS.items():
        value = os.environ.get(variable, idle).lower()
        if value != idle:
            said |= {option: fixed or value for option, fixed in options.items()}
    return said
