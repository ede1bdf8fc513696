"""How much memory a run will need at most, told before any weight is read.

What a step keeps for its backward pass is found by a step on fake tensors, which have shapes, types
and storages but no data: so every option has the effect that it has in the run.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sdxl_train.assembly import WEIGHT_DTYPES
from sdxl_train.document import peak_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from sdxl_train.assembly import Assembly
    from sdxl_train.config import RunConfig
    from sdxl_train.preflight import Prepared


def foretell(prepared: Prepared, assembly: Assembly, certain: Mapping[str, int]) -> dict[str, int]:
    """Give what comes on top of the bytes that are certain, and the peak of all.

    The peak is that of filling caches, when an encoder is there beside the denoiser, or that of a
    step of the largest bucket. Not in it: what an operation holds for a moment, and what caching
    images takes.

    Args:
        prepared: The run.
        assembly: On the meta device. Afterwards its tensors are fake.
        certain: Bytes by name, as in a plan.
    """
    config, device = prepared.config, prepared.config.device()
    # This process has imported what the run imports.
    process = peak_memory(torch.device("cpu"))["peak_bytes"] or 0
    base = process if device.type == "cpu" else 0
    encoder = assembly.model.sampler().decoder_bytes
    parameters = sum(parameter.numel() for parameter in assembly.parameters)
    optimizer = 2 * parameters * torch.float32.itemsize  # as Adam's kin keep
    activations = _activation_bytes(prepared, assembly, device)
    cached = [
        size
        for size, is_cached in (
            (encoder, config.dataset.caches_latents),
            (certain["text_encoder_bytes"], config.dataset.caches_text),
        )
        if is_cached
    ]
    stays = (
        certain["denoiser_bytes"]
        + certain["network_bytes"]
        + encoder
        + certain["text_encoder_bytes"]
        - sum(cached)
    )
    # What fills a cache is there for that time only, one after the other.
    caching = stays + max(cached, default=0)
    step = stays + certain["gradient_bytes"] + optimizer + activations
    return {
        "image_encoder_bytes": encoder,
        "optimizer_bytes": optimizer,
        "activation_bytes": activations,
        "process_bytes": base,
        "peak_bytes": base + max(caching, step),
    }


def remarks(config: RunConfig, memory: Mapping[str, int]) -> Iterator[str]:
    """Say that it does not fit, and which options to change, the mildest first."""
    available = available_bytes(config.device())
    if available is None or memory["peak_bytes"] <= available:
        return
    training, data = config.training, config.dataset
    changes = {
        "--cache_latents": not data.caches_latents,
        "--cache_text_encoder_outputs with --network_train_unet_only": not data.caches_text,
        "--mixed_precision bf16": training.mixed_precision == "no",
        "--gradient_checkpointing": not config.model.gradient_checkpointing,
        "a smaller --train_batch_size": data.train_batch_size > 1,
        "--fp8_base": config.quantization.build() is None,
    }
    helpful = [change for change, is_open in changes.items() if is_open]
    advice = ", then ".join(helpful) or "a smaller --resolution or --network_dim"
    yield (
        f"about {memory['peak_bytes'] / 1e9:.1f} GB are needed at most, and "
        f"{available / 1e9:.1f} GB are available: try {advice}"
    )


def available_bytes(device: torch.device) -> int | None:
    """Give the memory of a device that is free now; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return _available_here()
    return None


def _available_here() -> int:
    """Give the memory that programs can have: what is free, and what only caches files."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - no path of a user's
            known = dict(line.split()[:2] for line in file)
        return int(known["MemAvailable:"]) * 1024
    except FileNotFoundError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _activation_bytes(prepared: Prepared, assembly: Assembly, device: torch.device) -> int:
    """Count what a forward pass of the largest bucket keeps for the backward pass."""
    config, model = prepared.config, assembly.model
    batch = config.dataset.train_batch_size
    sizes = [image.fit.bucket for dataset in prepared.scan.datasets for image in dataset.images]
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    told = {name: (t.shape, t.dtype) for name, t in model.encode_text([""] * batch).items()}
    parts: list[nn.Module] = [model.denoiser, *assembly.adapter.modules()]
    precision = config.training.mixed_precision
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in parts:
            part.to_empty(device=device)
        own = {
            tensor.untyped_storage()._cdata
            for part in parts
            for tensor in (*part.parameters(), *part.buffers())
        }
        scale = model.latent_scale
        noisy = torch.empty(batch, 4, height // scale, width // scale, device=device)
        timesteps = torch.zeros(batch, dtype=torch.int64, device=device)
        condition = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in told.items()
        }
        pixels = torch.zeros(batch, 2, dtype=torch.int64, device=device)
        condition |= dict.fromkeys(("original_size", "crop_top_left", "target_size"), pixels)
        # By storage: many saved tensors are views of one. Kept, so that none is counted twice.
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        assembly.adapter.prepare_step(timesteps)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast(device.type, WEIGHT_DTYPES[precision], enabled=precision != "no"),
        ):
            prediction = model.predict(noisy, timesteps, condition)
    del prediction
    return sum(storage.nbytes() for storage in kept.values())
