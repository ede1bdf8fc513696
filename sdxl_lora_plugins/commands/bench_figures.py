"""What a benchmark measures with, and how its figures are told."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdxl_lora_plugins.made_up import MadeUpSdxl
from sdxl_train import peak_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from sdxl_train import RunConfig

PHASES: Final = ("data", "forward", "backward", "optimizer", "hooks", "logging")
_NOT_OF_A_STEP: Final = "saving"
DTYPES: Final = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NOT_TOLD: Final = ("model_type", "train_data_dir", "output_dir", "output_name", "max_train_steps")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured: the options of a run, its largest (width, height), its device."""

    config: RunConfig
    resolution: tuple[int, int]
    device: torch.device

    @property
    def rank(self) -> int:
        """Rank of the network; LoRA's default where it has none."""
        return self.config.network.network_dim or 4

    @property
    def images(self) -> int:
        """Images of a step."""
        config = self.config
        return config.dataset.train_batch_size * config.training.gradient_accumulation_steps

    def settings(self) -> dict[str, Any]:
        """Give the options that were set, but those of the data and the files."""
        return {
            name: item["value"]
            for name, item in self.config.options().items()
            if item["origin"] != "default" and name not in _NOT_TOLD
        }


StepTimes: TypeAlias = dict[str, float]
"""Seconds of each phase of a step."""


class Stopwatch:
    """Measures phases that follow each other; a step begins with its ``data``.

    On a GPU by events in its stream, which nothing waits for: a phase has the time until the work
    that it queued is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._laps: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]

    def lap(self, phase: str) -> None:
        """Take the end of a phase."""
        self._laps.append((phase, self._now()))

    def steps(self) -> list[StepTimes]:
        """Give the seconds of each phase of each step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        steps: list[StepTimes] = []
        for (_, began), (phase, ended) in zip(self._laps, self._laps[1:], strict=False):
            if phase == "data":
                steps.append({})
            if phase != _NOT_OF_A_STEP:
                steps[-1][phase] = steps[-1].get(phase, 0.0) + _seconds(began, ended)
        return steps

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _seconds(began: float | torch.cuda.Event, ended: float | torch.cuda.Event) -> float:
    if isinstance(began, torch.cuda.Event):
        assert isinstance(ended, torch.cuda.Event)
        milliseconds: float = began.elapsed_time(ended)
        return milliseconds / 1000
    assert isinstance(ended, float)
    return ended - began


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one loop.

    Attributes:
        seconds_per_step: The median of its steps.
        images_per_second: By that.
        tflops: 10^12 operations a second, by that.
        mfu: The share of the ceiling that this is.
        peak_bytes: The most memory that was in use: of the GPU, or of the process.
        breakdown: Seconds of each phase of a step, the mean.
    """

    seconds_per_step: float
    images_per_second: float
    tflops: float
    mfu: float
    peak_bytes: int | None
    breakdown: dict[str, float]

    @classmethod
    def of(
        cls,
        steps: Sequence[StepTimes],
        *,
        peak: int | None,
        images: int,
        flops: float,
        ceiling: float,
    ) -> Figures:
        """Make the figures of measured steps of ``images`` images and ``flops`` operations."""
        seconds = statistics.median(sum(step.values()) for step in steps)
        return cls(
            seconds_per_step=seconds,
            images_per_second=images / seconds,
            tflops=flops / seconds / 1e12,
            mfu=flops / seconds / ceiling,
            peak_bytes=peak,
            breakdown={
                phase: statistics.fmean(step.get(phase, 0.0) for step in steps)
                for phase in PHASES
                if any(phase in step for step in steps)
            },
        )

    def lines(self) -> Iterator[str]:
        """Tell the figures to people."""
        peak = f", {self.peak_bytes / 1e9:.2f} GB at most" if self.peak_bytes else ""
        yield (
            f"{self.seconds_per_step:.4g} s/it, {self.images_per_second:.3g} img/s, "
            f"{self.tflops:.3g} TFLOP/s, MFU {self.mfu:.1%}{peak}"
        )
        total = sum(self.breakdown.values())
        yield ", ".join(
            f"{phase} {seconds:.4g} s ({seconds / total:.1%})"
            for phase, seconds in self.breakdown.items()
        )


def ceiling(device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0) -> float:
    """Measure the operations a second of a large matrix product: the fastest of some."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    a @ b
    fastest, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        stopwatch = Stopwatch(device)
        a @ b
        stopwatch.lap("data")
        fastest = min(fastest, stopwatch.steps()[0]["data"])
    return float(2 * side**3 / fastest)


def training_flops(size: str, resolution: tuple[int, int], rank: int) -> int:
    """Count the operations of one sample: forward, and backward to what trains.

    Of the U-Net with a LoRA on its transformers, whichever network trains, without recomputing.
    Text encoders are left out, which are a hundredth of it.

    Args:
        size: Of the made-up model.
        resolution: (width, height) in pixels.
        rank: Of the LoRA.
    """
    model = MadeUpSdxl(pretrained_model_name_or_path=size, network_train_unet_only=True)
    loaded = model.build("meta", torch.float32)
    for path in list(adapted_layers(loaded.denoiser)):
        loaded.denoiser.set_submodule(path, _WithLora(loaded.denoiser.get_submodule(path), rank))
    width, height = (side // loaded.latent_scale for side in resolution)
    with torch.device("meta"):
        pixels = torch.zeros(1, 2, dtype=torch.int64)
        sizes = dict.fromkeys(("original_size", "crop_top_left", "target_size"), pixels)
        latents, timesteps = torch.zeros(1, 4, height, width), torch.zeros(1, dtype=torch.int64)
        text = {name: tensor.detach() for name, tensor in loaded.encode_text([""]).items()}
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(loaded.predict(latents, timesteps, {**text, **sizes}).sum())
    return int(counter.get_total_flops())


def adapted_layers(unet: nn.Module) -> Iterator[str]:
    """Name the layers that a LoRA of this program adapts: the linear ones of transformers."""
    for path, block in unet.named_modules():
        if type(block).__name__ == "Transformer2DModel":
            for name, layer in block.named_modules():
                if isinstance(layer, nn.Linear):
                    yield f"{path}.{name}"


class _WithLora(nn.Module):
    """A layer with a LoRA as it is written down, to count."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear)
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False, device="meta")
        self.up = nn.Linear(rank, layer.out_features, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x) + self.up(self.down(x))
        return output


def forget_peak(device: torch.device) -> None:
    """Begin to measure the peak of memory anew, where that is possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5", encoding="ascii")  # proc(5): resets the peak resident set size


def peak(device: torch.device) -> int | None:
    """Give the most memory in use since :func:`forget_peak`, or else since the start."""
    status = Path("/proc/self/status")
    if device.type != "cuda" and status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    used: int | None = peak_memory(device)["peak_bytes"]
    return used
