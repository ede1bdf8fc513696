"""Optimizers with 8-bit and paged state, and a base model of 4 or 8 bits, from bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import hookimpl
from sdxl_train_bitsandbytes import optimizers, quantizations

if TYPE_CHECKING:
    from sdxl_train import Optimizer, Quantization


@hookimpl
def register_quantizations() -> dict[str, type[Quantization]]:
    """Give the formats of frozen weights."""
    return {"nf4": quantizations.Nf4, "fp4": quantizations.Fp4, "int8": quantizations.Int8}


@hookimpl
def register_optimizers() -> dict[str, type[Optimizer]]:
    """Give the optimizers under the names of sd-scripts, and under their paths."""
    named: dict[str, type[Optimizer]] = {
        "Adam8bit": optimizers.Adam8bit,
        "AdamW8bit": optimizers.AdamW8bit,
        "PagedAdamW": optimizers.PagedAdamW,
        "PagedAdamW8bit": optimizers.PagedAdamW8bit,
        "PagedAdamW32bit": optimizers.PagedAdamW32bit,
        "Lion8bit": optimizers.Lion8bit,
        "PagedLion8bit": optimizers.PagedLion8bit,
        "AdEMAMix8bit": optimizers.AdEMAMix8bit,
        "PagedAdEMAMix8bit": optimizers.PagedAdEMAMix8bit,
        "SGDNesterov8bit": optimizers.SGDNesterov8bit,
    }
    paths = {
        f"bitsandbytes.optim.{name}": optimizer
        for name, optimizer in named.items()
        if name != "SGDNesterov8bit"
    }
    of = optimizers.FromBitsandbytes.of
    further = {name: of(f"bitsandbytes.optim.{name}") for name in (*FURTHER, *PLAIN)}
    paths |= {optimizer.path: optimizer for optimizer in further.values()}
    return named | paths | {name: further[name] for name in FURTHER}


FURTHER = (
    "Adagrad8bit",
    "Adagrad32bit",
    "Adam32bit",
    "AdamW32bit",
    "AdEMAMix32bit",
    "LAMB8bit",
    "LAMB32bit",
    "LARS8bit",
    "LARS32bit",
    "Lion32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix32bit",
    "PagedLion",
    "PagedLion32bit",
    "RMSprop8bit",
    "RMSprop32bit",
    "SGD8bit",
    "SGD32bit",
)
"""Those whose options are what their signatures say."""
PLAIN = (
    "AdEMAMix",
    "Adagrad",
    "Adam",
    "AdamW",
    "LAMB",
    "LARS",
    "Lion",
    "PytorchLARS",
    "RMSprop",
    "SGD",
)
"""Those with state of 32 bits, by path only: their names are those of other libraries too."""
