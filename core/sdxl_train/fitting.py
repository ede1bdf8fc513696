"""Which options to change so that a run fits into memory, found by foretelling it with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch

from sdxl_train.errors import UserError
from sdxl_train.footprint import PHASES, phase_of_peak
from sdxl_train.libraries import quiet
from sdxl_train.options import Setting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.preflight import Prepared

Forecast: TypeAlias = Callable[["Prepared", int], Mapping[str, int]]
"""Foretells a run in a process that takes so many bytes by itself."""

_WORTH: Final = 0.01
"""Share of the peak that a change has to spare."""


def remarks(
    prepared: Prepared,
    memory: Mapping[str, int],
    forecast: Forecast,
) -> Iterator[str]:
    """Say that a run does not fit, and which options to change, with the peak that it has then.

    Args:
        prepared: The run.
        memory: What was foretold of it.
        forecast: Foretells the same with other options.
    """
    available = available_bytes(prepared.config.device())
    if available is None or memory["peak_bytes"] <= available:
        return
    needed = (
        f"about {memory['peak_bytes'] / 1e9:.1f} GB are needed at most, "
        f"{PHASES[phase_of_peak(memory)]}, and {available / 1e9:.1f} GB are available"
    )
    words, peak = _try_changes(prepared, memory, forecast, available)
    last = "a smaller --resolution or --network_dim"
    if not words:
        yield f"{needed}: try {last}"
    elif peak <= available:
        yield f"{needed}: with {words} it takes {peak / 1e9:.1f} GB"
    else:
        yield f"{needed}: with {words} it takes {peak / 1e9:.1f} GB, still too much: try {last} too"


def _try_changes(
    prepared: Prepared,
    memory: Mapping[str, int],
    forecast: Forecast,
    available: int,
) -> tuple[str, int]:
    """Change option after option until it fits; give the flags that helped, and the peak."""
    changed: dict[str, Setting] = {}
    tried: list[dict[str, Any]] = []
    while memory["peak_bytes"] > available:
        left = (options for options in _changes(prepared, memory) if options not in tried)
        options = next(left, None)
        if options is None:
            break
        tried.append(options)
        more = {
            name: Setting(value=value, place=f"--{name}", origin="advice")
            for name, value in options.items()
        }
        try:
            with quiet("sdxl_train"):
                other = prepared.with_options({**changed, **more})
                found = forecast(other, memory["process_bytes"])
        except UserError:
            # Another option forbids it.
            continue
        if found["peak_bytes"] <= (1 - _WORTH) * memory["peak_bytes"]:
            changed, prepared, memory = {**changed, **more}, other, found
    words = (_words(name, setting.value) for name, setting in changed.items())
    return " ".join(words), memory["peak_bytes"]


def _changes(prepared: Prepared, memory: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Give options that act on the phase of the peak, the mildest first."""
    config, phase = prepared.config, phase_of_peak(memory)
    data, training = config.dataset, config.training
    in_step, encodes = phase == "passes_peak_bytes", phase == "encoding_peak_bytes"
    if (encodes or phase == "latents_peak_bytes") and data.vae_batch_size > 1:
        yield {"vae_batch_size": 1}
    if not data.caches_latents:
        yield {"cache_latents": True}
    if not data.caches_text:
        yield {"cache_text_encoder_outputs": True}
    if training.mixed_precision == "no":
        yield {"mixed_precision": "bf16"}
    if in_step and not config.model.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if (in_step or encodes) and data.train_batch_size > 1:
        batches = data.train_batch_size * training.gradient_accumulation_steps
        yield {"train_batch_size": 1, "gradient_accumulation_steps": batches}
    if not data.caches_text:
        yield {"cache_text_encoder_outputs": True, "network_train_unet_only": True}
    if config.quantization.build() is None:
        yield {"base_quantization": "fp8"}


def _words(name: str, value: object) -> str:
    return f"--{name}" if value is True else f"--{name} {value}"


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
