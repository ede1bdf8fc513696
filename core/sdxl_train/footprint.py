"""How much memory a run will need at most, told before any weight is read.

A run goes through phases that hold different things: it encodes images and captions where its
caches lack them, then it steps. The peak of memory is that of one of them.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

import torch

from sdxl_train.document import memory_now
from sdxl_train.protocols import HasImageEncoder, UnreadEncoders
from sdxl_train.ranks import ALONE
from sdxl_train.rehearsal import Rehearsal
from sdxl_train.supply import Supply

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdxl_train.assembly import Assembly
    from sdxl_train.config import RunConfig
    from sdxl_train.data.buckets import Size
    from sdxl_train.preflight import Prepared
    from sdxl_train.supply import Unmade

_RUNNING: Final = {"no": 36_000_000, "bf16": 80_000_000, "fp16": 80_000_000}
"""Bytes that a process on a CPU takes for modules and kernels once it steps, beside what it takes
when it plans, by precision; kernels for bf16 are generated. Measured with the tiny model, on x86-64
Linux with torch 2.13: 36 MB in fp32, 64 to 90 MB in bf16."""

PHASES: Final = {
    "latents_peak_bytes": "while latents are cached",
    "captions_peak_bytes": "while text encoder outputs are cached",
    "encoding_peak_bytes": "while a batch is encoded",
    "passes_peak_bytes": "in the forward and backward pass",
    "update_peak_bytes": "while the optimizer steps",
}
"""The phases of a run, by the names that a plan has for their peaks."""


def foretell(
    prepared: Prepared,
    assembly: Assembly,
    certain: Mapping[str, int],
    process: int | None = None,
) -> dict[str, int]:
    """Give what comes on top of the bytes that are certain, and the peak of each phase and of all.

    Not in it: what an operation takes inside of its kernel.

    Args:
        prepared: The run.
        assembly: On the meta device. Afterwards its tensors are fake.
        certain: Bytes by name, as in a plan.
        process: What the process itself takes on a CPU. Default: as much as this one will.
    """
    config, device, model = prepared.config, prepared.config.device(), assembly.model
    data, on_cpu = config.dataset, device.type == "cpu"
    if process is None:
        gc.collect()
        process = memory_now() + _RUNNING[config.training.mixed_precision] if on_cpu else 0
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
