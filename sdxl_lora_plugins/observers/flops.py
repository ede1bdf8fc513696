"""Which share of the device's peak a run computes at: model FLOPs utilization.

Chowdhery et al. 2022 (PaLM), appendix B: only what the model needs counts, so activations that are
computed twice (gradient checkpointing) make it lower. A frozen weight needs no gradient: of the
denoiser that is one forward pass and one backward pass through its activations, as costly again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from sdxl_train.ldm import LdmModel

if TYPE_CHECKING:
    from sdxl_train import LoadedModel, Run

PASSES: Final = 2

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
    """Give the ``value``, the ``peak`` that it is a share of, or ``why`` there is none."""
    device = next(iter(run.assembly.parameters)).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    steps = list(run.history.since(0))
    why = None
    if not steps:
        why = "no step is done"
    elif device.type != "cuda":
        why = "no peak rate of a CPU is known"
    elif not isinstance(run.config.model, LdmModel):
        why = "the operations of this model are not counted"
    elif run.config.training.mixed_precision == "no":
        why = "the peak rates that are known are of 16 bits"
    elif peak_of(name) is None:
        why = f"no peak rate of {name} is known"
    if why is not None:
        return {"value": None, "peak": None, "why": why}
    peak = peak_of(name)
    assert peak is not None
    # The median of all steps, of which the first ones compile and warm up.
    rates = sorted(step.samples / step.seconds for step in steps)
    value = mean_flops(run) * PASSES * rates[len(rates) // 2] / peak
    return {"value": value, "peak": peak, "why": None}


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
