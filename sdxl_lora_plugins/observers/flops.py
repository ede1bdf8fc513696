"""Which share of the device's peak a run computes at: model FLOPs utilization.

Chowdhery et al. 2022 (PaLM), appendix B: only what the model needs counts, so activations that are
computed twice (gradient checkpointing) make it lower. A frozen weight needs no gradient: of the
denoiser that is one forward pass and one backward pass through its activations, as costly again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import torch

from sdxl_train.ldm import LdmModel

if TYPE_CHECKING:
    from sdxl_train import LoadedModel, Run

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
    steps = list(run.history.since(0))
    why = None
    if not steps:
        why = "no step is done"
    elif not isinstance(run.config.model, LdmModel):
        why = "the operations of this model are not counted"
    if why is not None:
        return unknown_utilization(why)
    device = next(iter(run.assembly.parameters)).device
    dtype = _DTYPES[run.config.training.mixed_precision]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = peak_of(name) if dtype != torch.float32 else None
    peak = known or measured_peak(device, dtype)
    # The median of all steps, of which the first ones compile and warm up.
    rates = sorted(step.samples / step.seconds for step in steps)
    rate = mean_flops(run) * PASSES * rates[len(rates) // 2]
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


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure what the device reaches in a product of two large matrices, in FLOP/s.

    That is about the most that a model can. Takes a fraction of a second.
    """
    side = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    seconds = []
    for _ in range(_MEASUREMENTS):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def mean_flops(run: Run) -> float:
    """Give the operations of the denoiser for one sample: the mean over the buckets."""
    model = run.config.model.build("meta", torch.float32)
    buckets = run.plan.dataset["buckets"]
    total = sum(forward_flops(model, *b["resolution"]) * b["images"] for b in buckets)
    return float(total / sum(bucket["images"] for bucket in buckets))


def forward_flops(model: LoadedModel, width: int, height: int) -> int:
    """Count the operations of one forward pass of the denoiser of a model on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    scale = model.latent_scale
    with torch.no_grad(), torch.device("meta"):
        text = model.encode_text([""])
        size = torch.zeros(1, 2, dtype=torch.int64)
        sizes = dict.fromkeys(("original_size", "crop_top_left", "target_size"), size)
        latents = torch.zeros(1, 4, height // scale, width // scale)
        with FlopCounterMode(display=False) as counter:
            model.predict(latents, torch.zeros(1, dtype=torch.int64), {**text, **sizes})
    return int(counter.get_total_flops())
