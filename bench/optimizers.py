"""Measure a step of torch's optimizers in the ways that they can be computed.

    python -m bench.optimizers [--rank 16] [--turns 4] [NAME ...]

The parameters are those of a LoRA on the U-Net of SDXL. All ways are measured in turns; told are
the medians, the first turn left out.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from bench.fused import factors
from sdxl_lora_plugins import register_optimizers

WAYS = {
    "one by one": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def measure(name: str, rank: int, turns: int) -> dict[str, float]:
    """Give the seconds of a step by the way it is computed."""
    parameters = factors(rank)
    component = register_optimizers()[name]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizers = {}
    for way, options in WAYS.items():
        if "fused" in component.model_fields or way != "fused":
            off = {"fused": False} if "fused" in component.model_fields and way != "fused" else {}
            built = component(learning_rate=1e-6, **options, **off)
            optimizers[way] = built.build([{"params": parameters, "lr": 1e-6, "name": "unet"}])
    seconds: dict[str, list[float]] = {way: [] for way in optimizers}
    for _ in range(turns):
        for way, optimizer in optimizers.items():
            before = time.perf_counter()
            optimizer.step()
            seconds[way].append(time.perf_counter() - before)
    return {way: statistics.median(found[1:]) for way, found in seconds.items()}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["AdamW", "SGD", "Adagrad", "RMSprop", "NAdam"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--turns", type=int, default=4)
    given = parser.parse_args()
    print(f"| | {' | '.join(WAYS)} |")
    print(f"|---|{'---|' * len(WAYS)}")
    for name in given.names:
        found = measure(name, given.rank, given.turns)
        cells = (f"{found[way]:.3f}" if way in found else "-" for way in WAYS)
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
