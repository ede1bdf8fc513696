"""Measure the gradients that are held at once, with and without ``fused_backward_pass``.

    python bench/fused.py [--rank 16] [--optimizer AdamW]

The parameters are those of a LoRA on the U-Net of SDXL, by the shapes of sd-scripts' file. Each
factor's gradient comes from a backward pass of its own layer, as in training; what is held is read
at each gradient's arrival.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import torch

from sdxl_lora_plugins import optimizers
from sdxl_train.fused import FusedBackward

SHAPES = Path(__file__).parents[1] / "tests" / "data" / "keys_lora_dim4.json.gz"
RANK_THERE = 4


def factors(rank: int) -> list[torch.nn.Parameter]:
    """Make the factors of a LoRA on the U-Net."""
    entries = json.loads(gzip.decompress(SHAPES.read_bytes()))
    found = []
    for name, entry in entries.items():
        if name.startswith("lora_unet_") and name.endswith(".weight"):
            shape = list(entry["shape"])
            shape[0 if "lora_down" in name else 1] = rank
            found.append(torch.nn.Parameter(torch.full(shape, 1e-3)))
    return found


def measure(rank: int, optimizer: str, *, fused: bool) -> tuple[int, float]:
    """Give the most bytes of gradients held at once, and the seconds of a step after the first."""
    parameters = factors(rank)
    held = 0

    def count(_: torch.Tensor) -> None:
        nonlocal held
        held = max(held, sum(p.grad.nbytes for p in parameters if p.grad is not None))

    handles = [p.register_post_accumulate_grad_hook(count) for p in parameters]  # type: ignore[no-untyped-call]
    component = getattr(optimizers, optimizer)()
    inner = component.build([{"params": parameters, "lr": 1e-4, "name": "unet"}])
    if fused:
        FusedBackward(inner, max_norm=0)
    seconds = 0.0
    for step in range(3):
        if step == 1:
            for handle in handles:
                handle.remove()
        before = time.perf_counter()
        torch.autograd.backward(torch.stack([p.square().sum() for p in parameters]).sum())
        if not fused:
            inner.step()
            inner.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - before
    return held, seconds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optimizer", default="AdamW")
    options = parser.parse_args()
    print(f"LoRA of rank {options.rank} on the U-Net, fp32, {options.optimizer}\n")
    print("| | gradients held at once | backward and step |")
    print("|---|---|---|")
    for fused in (False, True):
        held, seconds = measure(options.rank, options.optimizer, fused=fused)
        name = "`--fused_backward_pass`" if fused else "ordinary"
        print(f"| {name} | {held / 1e6:.2f} MB | {seconds:.3f} s |")


if __name__ == "__main__":
    main()
