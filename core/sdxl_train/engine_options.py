"""What is spread over processes: DeepSpeed's options under sd-scripts' names, and FSDP's."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sdxl_train.components import OptionModel
from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.config import RunConfig

Place = Literal["none", "cpu", "nvme"]

_UNFIT = {
    "zero3_init_flag": (
        "is about models that are made in memory; this one is mapped from its file, and each "
        "process keeps its part of it"
    ),
    "zero3_save_16bit_model": (
        "is about models whose parts have to be put together for a file; networks are always "
        "saved whole"
    ),
    "fp16_master_weights_and_gradients": (
        "would round what trains to fp16, in which small updates are lost"
    ),
    "offload_optimizer_nvme_path": "is for NVMe, which DeepSpeed uses with stage 3 of its own only",
    "offload_param_nvme_path": "is for NVMe, where FSDP keeps nothing",
}
"""Options of DeepSpeed that this run has no use for, and why."""
_REMEDIES = {
    "zero3_save_16bit_model": "leave it out; --save_precision is the precision of files",
    "fp16_master_weights_and_gradients": "leave it out, or train in 16 bits with --full_bf16",
    "offload_optimizer_nvme_path": "--offload_optimizer_device cpu keeps the same in memory",
    "offload_param_nvme_path": "--offload_param_device cpu keeps the same in memory",
}


class EngineOptions(OptionModel):
    """What each process keeps a part of only, in place of all of it."""

    deepspeed: bool = Field(
        False,
        description="Spread the optimizer's state over the processes, with DeepSpeed (its ZeRO).",
    )
    zero_stage: int | None = Field(
        None,
        ge=0,
        le=3,
        description="With --deepspeed: 1 spreads the optimizer's state, 2 its gradients too, 3 is "
        "2 and --fsdp. Default: 2.",
    )
    offload_optimizer_device: Place | None = Field(
        None,
        description="With --deepspeed: cpu keeps the optimizer's state in main memory, and steps "
        "there.",
    )
    offload_optimizer_nvme_path: str | None = Field(None, description="Of DeepSpeed; refused.")
    fsdp: bool = Field(
        False,
        description="Spread the frozen weights of the denoiser over the processes, with torch's "
        "FSDP: each gathers a block when it is computed.",
    )
    offload_param_device: Place | None = Field(
        None,
        description="With --fsdp or --zero_stage 3: cpu keeps a process's part of the frozen "
        "weights in main memory.",
    )
    offload_param_nvme_path: str | None = Field(None, description="Of DeepSpeed; refused.")
    zero3_init_flag: bool = Field(False, description="Of DeepSpeed; refused.")
    zero3_save_16bit_model: bool = Field(False, description="Of DeepSpeed; refused.")
    fp16_master_weights_and_gradients: bool = Field(False, description="Of DeepSpeed; refused.")

    @property
    def spreads_base(self) -> bool:
        """Whether each process keeps a part of the frozen weights only."""
        return self.fsdp or (self.deepspeed and self.zero_stage == 3)

    def engine_problems(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse what would have no effect, or not the one that its name says."""
        for name, reason in _UNFIT.items():
            if getattr(self, name) not in (None, False, "none"):
                remedy = _REMEDIES.get(name, "leave it out")
                yield Problem(place=config.place(name), message=reason, remedy=remedy)
        for name in ("offload_optimizer_device", "offload_param_device"):
            if getattr(self, name) == "nvme":
                path = name.replace("device", "nvme_path")
                yield Problem(
                    place=config.place(name),
                    message=f"nvme: this {_UNFIT[path]}",
                    remedy="set it to cpu, or leave it out",
                )
        yield from self._without_engine(config)
        if self.deepspeed:
            yield from self._deepspeed_problems(config)
        if self.spreads_base and not config.quantization.default:
            yield Problem(
                place=config.place("base_quantization"),
                message=f"{config.name_of('quantization')} does not go with weights that are "
                f"spread over processes ({config.place('fsdp' if self.fsdp else 'zero_stage')})",
                remedy="leave one of them out",
            )

    def _without_engine(self, config: RunConfig) -> Iterator[Problem]:
        needs = {
            "zero_stage": (self.deepspeed, "--deepspeed"),
            "offload_optimizer_device": (self.deepspeed, "--deepspeed"),
            "offload_param_device": (self.spreads_base, "--fsdp, or --deepspeed --zero_stage 3"),
        }
        for name, (is_there, needed) in needs.items():
            if getattr(self, name) not in (None, "none") and not is_there:
                yield Problem(
                    place=config.place(name),
                    message=f"has no effect without {needed}",
                    remedy=f"add {needed}, or leave it out",
                )

    def _deepspeed_problems(self, config: RunConfig) -> Iterator[Problem]:
        training = config.training
        place = config.place("deepspeed")
        if find_spec("deepspeed") is None:
            yield Problem(
                place=place,
                message="needs the package deepspeed, which is not installed",
                remedy='pip install "sdxl-train[deepspeed]"',
            )
        if self.zero_stage == 0:
            yield Problem(
                place=config.place("zero_stage"),
                message="0 spreads nothing: so do processes without DeepSpeed",
                remedy="leave --deepspeed and --zero_stage out",
            )
        optimizer = f"{config.place('optimizer_type')} {config.name_of('optimizer')}"
        hindrances = {
            f"{optimizer}, which looks at more of a weight than a process has of it": (
                not config.optimizer.elementwise
            ),
            f"{config.place('fused_backward_pass')}, whose steps come before the gradients are "
            "added up": training.fused_backward_pass,
            f"{config.place('full_bf16' if training.full_bf16 else 'full_fp16')}: DeepSpeed's "
            "parts are fp32": training.trained_precision != "no",
        }
        for hindrance, is_there in hindrances.items():
            if is_there:
                yield Problem(
                    place=place,
                    message=f"does not go with {hindrance}",
                    remedy="leave one of them out; docs/distributed.md says what goes with it",
                )
