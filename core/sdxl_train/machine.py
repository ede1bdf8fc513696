"""What the options ask of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.config import RunConfig


def machine_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what the options ask for that this machine does not have.

    Imports torch, but only for options that ask for something.
    """
    for component in config.components:
        yield from component.machine_problems(config)
    precision, device = config.training.mixed_precision, config.training.device
    if device not in ("cuda", "mps") and precision != "fp16":
        return
    import torch

    missing = (device == "cuda" and not torch.cuda.is_available()) or (
        device == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        yield Problem(
            place=config.place("device"),
            message=f"there is no {device} device on this machine, or this torch cannot use it",
            remedy="use --device auto or cpu, or install a torch built for it",
        )
    if precision == "fp16" and (device == "cpu" or not torch.cuda.is_available()):
        yield Problem(
            place=config.place("mixed_precision"),
            message="fp16 needs a GPU, and this run has none",
            remedy="use --mixed_precision bf16 or no",
        )
