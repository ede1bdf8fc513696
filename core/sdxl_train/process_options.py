"""Options of several processes, under sd-scripts' names; what they cannot mean here is said."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pydantic import Field

from sdxl_train.components import OptionModel
from sdxl_train.errors import Problem

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


class ProcessOptions(OptionModel):
    """How several processes train together."""

    ddp_timeout: int | None = Field(
        None, ge=1, description="Minutes to wait for another process. Default: torch's, 30."
    )
    ddp_gradient_as_bucket_view: bool = Field(
        False, description="No effect: gradients are always exchanged in one piece."
    )
    ddp_static_graph: bool = Field(
        False, description="No effect: the exchange never looks at the graph."
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
                    place="accelerate's configuration",
                    message=f"asks for {engine}, which is not supported: only the network trains",
                    remedy="choose MULTI_GPU there, or pass --multi_gpu to accelerate launch",
                )
        if config.training.fused_backward_pass and processes > 1:
            yield Problem(
                place=config.place("fused_backward_pass"),
                message=f"steps before the gradients of all {processes} processes can be added up",
                remedy="leave it out, or train with one process",
            )

    def remarks(self, config: RunConfig, processes: int) -> Iterator[str]:
        """Say what has no effect, and which of accelerate's settings this run does not follow."""
        for name in ("ddp_gradient_as_bucket_view", "ddp_static_graph"):
            if getattr(self, name):
                yield (
                    f"{config.place(name)} has no effect: gradients are not exchanged by DDP, but "
                    f"in one flat all-reduce each step"
                )
        if self.ddp_timeout is not None and processes == 1:
            yield f"{config.place('ddp_timeout')} has no effect with one process"
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        if precision not in ("no", config.training.mixed_precision):
            yield (
                f"accelerate's configuration says mixed precision {precision}; what counts is "
                f"--mixed_precision, which is {config.training.mixed_precision}"
            )
        accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        if accumulation not in ("1", str(config.training.gradient_accumulation_steps)):
            yield (
                f"accelerate's configuration says {accumulation} gradient accumulation steps; what "
                f"counts is --gradient_accumulation_steps"
            )
        dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
        if dynamo.lower() != "no":
            yield (
                f"accelerate's configuration says dynamo backend {dynamo}; what counts is "
                f"--torch_compile"
            )
