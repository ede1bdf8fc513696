"""Time forward and backward of an adapted layer: ours, peft's and LyCORIS's, in one process.

    python bench/networks.py [--repeats 15] [--device cpu] [--dtype float32]

The layers are SDXL's: an attention projection at 64x64 and at 32x32 latent pixels ([4096, 640] and
[1024, 1280] activations for each image), and the 3x3 convolution of a resnet of that size. The
adapters take turns, so that what else the machine does hits all alike; the fastest of the repeats
counts, the one least disturbed. On a CPU it is the time of this process alone, in one thread. The
last columns are the fastest of the others over ours, where 1 or more is at least as fast, and
between which values the middle half of this ratio lies, taken turn by turn.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import time
from importlib.metadata import version
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdxl_lora_plugins.networks import Lora
from sdxl_lora_plugins.networks.lora import LoraLayer
from sdxl_lora_plugins.networks.targets import Target

if TYPE_CHECKING:
    from collections.abc import Callable

    Step = Callable[[], None]

SIZES = {64: 640, 32: 1280}
"""Channels by side in latent pixels."""
BATCHES = (1, 4)
RANKS = (16, 64)


def ours(layer: Any, rank: int) -> Callable[[Tensor], Tensor]:
    """Adapt a layer with the built-in LoRA."""
    target = Target(name="layer", part="unet", layer=layer, rank=rank, alpha=rank / 2, group="unet")
    adapted = LoraLayer(target, Lora(network_dim=rank)).to(layer.weight.device)
    nn.init.normal_(adapted.lora_up.weight, std=0.02)
    layer.keep = adapted
    return adapted.forward


def of_peft(layer: Any, rank: int) -> Callable[[Tensor], Tensor]:
    """Adapt a layer with peft's LoRA."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank // 2, target_modules=["layer"])
    holder = nn.Module()
    holder.layer = layer
    holder.forward = lambda x: holder.layer(x)  # type: ignore[method-assign]
    model = get_peft_model(holder, config)  # type: ignore[arg-type]
    model.train()
    adapted = model.base_model.model.layer
    nn.init.normal_(adapted.lora_B["default"].weight, std=0.02)
    return adapted  # type: ignore[no-any-return]


def of_lycoris(layer: Any, rank: int, *, bypass: bool) -> Callable[[Tensor], Tensor]:
    """Adapt a layer with LyCORIS's LoCon: by its factors, or by the weight that they make."""
    from lycoris.modules.locon import LoConModule

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    module = LoConModule("layer", layer, 1.0, rank, rank / 2, bypass_mode=bypass)
    module.to(layer.weight.device)
    module.apply_to()
    module.train()
    nn.init.normal_(module.lora_up.weight, std=0.02)
    layer.keep = module
    return layer  # type: ignore[no-any-return]


def make_steps(shape: tuple[int, ...], rank: int, where: Any) -> dict[str, Step]:
    """Make a training step of each adapter, on the same weights and input.

    Args:
        shape: Of the input: [batch, tokens, channels], or [batch, channels, height, width].
        rank: Of the adapters.
        where: Device, dtype, and whether precision is mixed.
    """
    torch.manual_seed(0)
    x = torch.randn(shape)
    channels = shape[2] if len(shape) == 3 else shape[1]
    x = x.to(where.device, where.dtype).requires_grad_()
    makers: dict[str, Callable[[Any, int], Callable[[Tensor], Tensor]]] = {
        "ours": ours,
        "peft": of_peft,
        "lycoris bypass": lambda layer, r: of_lycoris(layer, r, bypass=True),
        "lycoris weight": lambda layer, r: of_lycoris(layer, r, bypass=False),
    }

    def step_of(make: Callable[[Any, int], Callable[[Tensor], Tensor]]) -> Step:
        torch.manual_seed(1)
        layer: nn.Module = nn.Linear(channels, channels)
        if len(shape) == 4:
            layer = nn.Conv2d(channels, channels, 3, padding=1)
        layer.to(where.device, where.dtype).requires_grad_(requires_grad=False)
        forward = make(layer, rank)

        def step() -> None:
            with torch.autocast(where.device, dtype=where.dtype, enabled=where.mixed):
                output = forward(x)
            output.backward(torch.ones_like(output))
            x.grad = None
            if where.device == "cuda":
                torch.cuda.synchronize()

        return step

    return {name: step_of(make) for name, make in makers.items()}


def measure(
    steps: dict[str, Step], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Give the seconds of each step in each turn; they take turns in changing order."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = clock()
            steps[name]()
            times[name].append(clock() - started)
    # The first turn warms up.
    return {name: taken[1:] for name, taken in times.items()}


def cells(taken: dict[str, list[float]]) -> list[str]:
    """Give the columns of a row: the fastest turn of each, and how the best of the others fares."""
    least = {name: min(times) for name, times in taken.items()}
    rival = min(least.keys() - {"ours"}, key=least.__getitem__)
    ratios = [a / b for a, b in zip(taken[rival], taken["ours"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    ratio = least[rival] / least["ours"]
    return [
        *(f"{1000 * t:.1f} ms" for t in least.values()),
        f"{ratio:.2f}",
        f"{low:.2f}-{high:.2f}",
    ]


def main() -> None:
    """Measure every row and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--kind", nargs="*", default=["linear", "conv"])
    parser.add_argument("--side", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--batch", type=int, nargs="*", default=list(BATCHES))
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    where = SimpleNamespace(device=given.device, dtype=dtype, mixed=dtype != torch.float32)
    clock = time.perf_counter
    if given.device == "cpu":
        clock = time.process_time
        torch.set_num_threads(1)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "peft", "lycoris-lora"))
    threads = torch.get_num_threads()
    print(f"{platform.machine()}, {given.device}, {given.dtype}, {threads} threads, {versions}\n")
    print(
        "| layer | input | rank | ours | peft | lycoris bypass | lycoris weight | ratio | spread |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in given.kind:
        for side in given.side:
            channels = SIZES[side]
            for batch in given.batch:
                for rank in RANKS:
                    size: tuple[int, ...] = (batch, side * side, channels)
                    if kind == "conv":
                        size = (batch, channels, side, side)
                    steps = make_steps(size, rank, where)
                    taken = measure(steps, given.repeats, clock)
                    shape = f"{batch} x {list(size[1:])}"
                    print(f"| {kind} | {shape} | {rank} | {' | '.join(cells(taken))} |", flush=True)


if __name__ == "__main__":
    main()
