"""Which share of the device's peak a run computes at: model FLOPs utilization.

Chowdhery et al. 2022 (PaLM), appendix B: only what the model needs counts, so activations that are
computed twice (gradient checkpointing) make it lower. A frozen weight needs no gradient: of the
denoiser that is one forward pass and one backward pass through its activations, as costly again.
"""

from __future__ import annotations

import functools
import math
import time
from typing import TYPE_CHECKING, Any, Final

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from sdxl_train.ldm import LoadedLdm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdxl_train import Run

PASSES: Final = 2
_DTYPES: Final = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MEASUREMENTS: Final = 4

PEAKS: Final[tuple[tuple[str, float], ...]] = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A40", 150e12),
    ("A10", 125e12),
    ("A6000", 155e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 5090", 210e12),
    ("RTX 4090", 165e12),
    ("RTX 4080", 97e12),
    ("RTX 3090", 71e12),
    ("T4", 65e12),
    ("V100", 125e12),
)
"""Peak rates of dense 16-bit matrix products with 32-bit sums, from the makers' data sheets. The
first whose name is part of the device's."""


def peak_of(device_name: str) -> float | None:
    """Give the peak rate of a device in FLOP/s; None if it is not known."""
    return next((peak for name, peak in PEAKS if name in device_name), None)


def utilization(run: Run) -> dict[str, Any]:
    """Give how fast the denoiser computes, and which share of the device's peak that is.

    Returns:
        ``rate`` and ``peak`` in FLOP/s, ``value``, the one divided by the other, and
        ``peak_of``: ``data sheet``, or ``measured`` where none is known for this device and type.
        All are None where there is a reason, ``why``.
    """
    model, steps = run.assembly.model, list(run.history.since(0))
    if not steps:
        return unknown_utilization("no step is done")
    if not isinstance(model, LoadedLdm):
        return unknown_utilization("the operations of this model are not counted")
    device = next(iter(run.assembly.parameters)).device
    dtype = _DTYPES[run.config.training.mixed_precision]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = peak_of(name) if dtype != torch.float32 else None
    peak = known or measured_peak(device, dtype)
    # The median of all steps, of which the first ones compile and warm up.
    rates = sorted(step.samples / step.seconds for step in steps)
    rate = mean_flops(run, model) * PASSES * rates[len(rates) // 2]
    return {
        "value": rate / peak,
        "rate": rate,
        "peak": peak,
        "peak_of": "data sheet" if known else "measured",
        "why": None,
    }


def unknown_utilization(why: str) -> dict[str, Any]:
    """Give what stands for a utilization that cannot be told."""
    return {**dict.fromkeys(("value", "rate", "peak", "peak_of")), "why": why}


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure what the device reaches in a product of two large matrices, in FLOP/s.

    That is about the most that a model can. Takes a fraction of a second, once in a process.
    """
    side = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    seconds = []
    for _ in range(_MEASUREMENTS):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def mean_flops(run: Run, model: LoadedLdm) -> float:
    """Give the operations of the denoiser for one sample: the mean over the buckets."""
    scale, tokens = model.latent_scale, model.max_tokens + 2  # begin and end
    buckets = run.plan.dataset["buckets"]
    total = 0
    for bucket in buckets:
        width, height = (side // scale for side in bucket["resolution"])
        total += bucket["images"] * forward_flops(model.denoiser, width, height, tokens)
    return float(total / sum(bucket["images"] for bucket in buckets))


def forward_flops(unet: nn.Module, width: int, height: int, tokens: int) -> int:
    """Count the operations of one forward pass: those of its matrix products.

    A layer multiplies its weight with as many columns as its output has positions, and those
    follow from where it stands.

    Args:
        unet: Of diffusers' layout, on any device.
        width: Of the latents.
        height: Of the latents.
        tokens: Of the text that it is told.
    """
    sizes = [(width, height)]
    for _ in range(len(unet.get_submodule("down_blocks")) - 1):  # type: ignore[arg-type]
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    pixels = [w * h for w, h in sizes]
    total = 0
    for path, layer in unet.named_modules():
        if isinstance(layer, nn.Linear):
            total += 2 * layer.in_features * layer.out_features * _positions(path, pixels, tokens)
        elif isinstance(layer, nn.Conv2d):
            # Not of its weight, which may be packed.
            each = layer.in_channels // layer.groups * layer.out_channels
            total += 2 * each * math.prod(layer.kernel_size) * _positions(path, pixels, tokens)
        elif isinstance(layer, Attention):
            queries, keys = (_positions(f"{path}.{name}", pixels, tokens) for name in ("q", "to_k"))
            # Queries with keys, and what comes of that with values.
            total += 2 * 2 * queries * keys * layer.inner_dim
    return total


def _positions(path: str, pixels: Sequence[int], tokens: int) -> int:
    """Give for how many positions a layer of a U-Net computes.

    Args:
        path: Of the layer.
        pixels: Of each level, the finest first.
        tokens: Of the text.
    """
    block, *within = path.split(".")
    if "embedding" in block or "time_emb_proj" in within:
        return 1
    if "attn2" in within and within[-1] in ("to_k", "to_v"):
        return tokens
    if block == "mid_block":
        return pixels[-1]
    if block == "down_blocks":
        return pixels[int(within[0]) + ("downsamplers" in within)]
    if block == "up_blocks":
        return pixels[len(pixels) - 1 - int(within[0]) - ("upsamplers" in within)]
    return pixels[0]
