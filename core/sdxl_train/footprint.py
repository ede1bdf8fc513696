"""How much memory a run will need at most, told before any weight is read.

A run goes through phases that hold different things: it encodes images and captions where its
caches lack them, then it steps. The peak of memory is that of one of them.
"""

from __future__ import annotations

import gc
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

import torch

from sdxl_train.document import memory_now
from sdxl_train.protocols import HasImageEncoder, UnreadEncoders
from sdxl_train.ranks import ALONE
from sdxl_train.rehearsal import Rehearsal
from sdxl_train.supply import Supply

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sdxl_train.assembly import Assembly
    from sdxl_train.config import RunConfig
    from sdxl_train.data.buckets import Size
    from sdxl_train.preflight import Prepared
    from sdxl_train.supply import Unmade

PHASES: Final = {
    "latents_peak_bytes": "while latents are cached",
    "captions_peak_bytes": "while text encoder outputs are cached",
    "encoding_peak_bytes": "while a batch is encoded",
    "passes_peak_bytes": "in the forward and backward pass",
    "update_peak_bytes": "while the optimizer steps",
}
"""The phases of a run, by the names that a plan has for their peaks."""


def foretell(prepared: Prepared, assembly: Assembly, certain: Mapping[str, int]) -> dict[str, int]:
    """Give what comes on top of the bytes that are certain, and the peak of each phase and of all.

    Not in it: what an operation takes inside of its kernel.

    Args:
        prepared: The run.
        assembly: On the meta device. Afterwards its tensors are fake.
        certain: Bytes by name, as in a plan.
    """
    config, device, model = prepared.config, prepared.config.device(), assembly.model
    data, on_cpu = config.dataset, device.type == "cpu"
    gc.collect()
    process = memory_now() if on_cpu else 0
    trains_text = any(part.module is not model.denoiser for part in model.parts)
    supply = Supply(prepared, model, device, nullcontext, trains_text=trains_text, ranks=ALONE)
    unmade = supply.unmade()
    kept = _kept_bytes(config, assembly, unmade) if on_cpu else 0
    decoder = certain.get("sample_decoder_bytes", 0)
    encoder, text = _image_encoder_bytes(assembly), certain["text_encoder_bytes"]
    rehearsal = Rehearsal(config, assembly, device)

    numbers = sum(parameter.numel() for parameter in assembly.parameters)
    averages = sum(observer.averages for observer in config.observers)
    held = process + certain["denoiser_bytes"] + certain["network_bytes"]
    held += averages * numbers * torch.float32.itemsize
    # Prompts of samples are encoded first of all.
    text_waits = data.caches_text and isinstance(model, UnreadEncoders) and not decoder
    phases = {}
    if unmade.images:
        largest = max(unmade.images, key=_area)
        there = held + encoder + (0 if text_waits else text)
        phases["latents_peak_bytes"] = there + rehearsal.encode_images(data.vae_batch_size, largest)
    held += 0 if data.caches_latents and not (decoder and on_cpu) else max(encoder, decoder)
    if unmade.captions:
        count = min(unmade.captions, data.text_encoder_batch_size)
        phases["captions_peak_bytes"] = held + text + rehearsal.encode_text(count)
    held += kept + (0 if data.caches_text else text)
    batch_size, size = _largest_batch(prepared)
    if not data.caches_latents:
        encoded = rehearsal.encode_images(min(batch_size, data.vae_batch_size), size)
    step = rehearsal.step(batch_size, size)
    if not data.caches_latents:
        phases["encoding_peak_bytes"] = held + step.state + encoded
    phases["passes_peak_bytes"] = held + step.passes
    phases["update_peak_bytes"] = held + step.update
    return {
        "image_encoder_bytes": encoder,
        "optimizer_bytes": step.state,
        "activation_bytes": step.activations,
        "process_bytes": process,
        **phases,
        "peak_bytes": max(phases.values()),
    }


def _image_encoder_bytes(assembly: Assembly) -> int:
    """Count the weights of what encodes images; what decodes them belongs to it."""
    model = assembly.model
    if not isinstance(model, HasImageEncoder):
        return model.sampler().decoder_bytes
    assert model.image_encoder is not None
    return sum(p.numel() * p.element_size() for p in model.image_encoder.parameters())


def _kept_bytes(config: RunConfig, assembly: Assembly, unmade: Unmade) -> int:
    """Count the encodings that are kept in main memory, for this run."""
    data, model = config.dataset, assembly.model
    kept = 0
    if data.caches_latents and not data.cache_latents_to_disk:
        side = 8 * model.latent_scale
        latents = model.encode_images(torch.empty(1, 3, side, side))
        pixels = sum(map(_area, unmade.images))
        kept += pixels * latents.shape[1] * torch.float32.itemsize // model.latent_scale**2
    if data.caches_text and not data.cache_text_encoder_outputs_to_disk:
        encoded = model.encode_text([""]).values()
        kept += unmade.captions * sum(t.numel() * t.element_size() for t in encoded)
    return kept


def _largest_batch(prepared: Prepared) -> tuple[int, Size]:
    """Give the number of samples, and the (width, height), of the largest batch of a process."""
    parts = (spec.part(0, prepared.processes) for spec in prepared.batches.epoch(1))
    batches = ((max(len(part.samples), 1), part.bucket) for part in parts)
    return max(batches, key=lambda batch: batch[0] * _area(batch[1]))


def _area(size: Size) -> int:
    return size[0] * size[1]


def phase_of_peak(memory: Mapping[str, int]) -> str:
    """Give the name of the phase in which the peak of a plan is."""
    return next(name for name in PHASES if memory.get(name) == memory["peak_bytes"])


def remarks(config: RunConfig, memory: Mapping[str, int]) -> Iterator[str]:
    """Say that it does not fit, and which options to change, the mildest first."""
    available = available_bytes(config.device())
    if available is None or memory["peak_bytes"] <= available:
        return
    training, data, phase = config.training, config.dataset, phase_of_peak(memory)
    in_step, encodes = phase == "passes_peak_bytes", phase == "encoding_peak_bytes"
    of_images = encodes or phase == "latents_peak_bytes"
    changes = {
        "--vae_batch_size 1": of_images and data.vae_batch_size > 1,
        "--cache_latents": not data.caches_latents,
        "--cache_text_encoder_outputs with --network_train_unet_only": not data.caches_text,
        "--mixed_precision bf16": training.mixed_precision == "no",
        "--gradient_checkpointing": in_step and not config.model.gradient_checkpointing,
        "a smaller --train_batch_size": (in_step or encodes) and data.train_batch_size > 1,
        "--fp8_base": config.quantization.build() is None,
    }
    helpful = [change for change, helps in changes.items() if helps]
    advice = ", then ".join(helpful) or "a smaller --resolution or --network_dim"
    yield (
        f"about {memory['peak_bytes'] / 1e9:.1f} GB are needed at most, {PHASES[phase]}, and "
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
