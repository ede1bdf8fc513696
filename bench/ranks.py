"""How long the exchange of the gradients takes, and how many bytes it sends, over gloo on the CPU.

python bench/ranks.py [--parameters 2659840] [--tensors 1444]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from sdxl_train.ranks import join

STEPS = 5


def exchange(index: int, count: int, meeting: Path, parameters: int, tensors: int) -> None:
    """Add gradients up a few times; the first process prints the median time."""
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(count))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=index, world_size=count)
    ranks = join()
    weights = [torch.zeros(parameters // tensors, requires_grad=True) for _ in range(tensors)]
    times = []
    for _ in range(STEPS):
        for weight in weights:
            weight.grad = torch.full_like(weight, 1.0 + index)
        began = time.perf_counter()
        ranks.add_up(weights, [torch.zeros(1)])
        times.append(time.perf_counter() - began)
    total = sum(range(1, count + 1))
    assert all(weight.grad is not None and weight.grad[0] == total for weight in weights)
    if index == 0:
        sent = 4 * (sum(weight.numel() for weight in weights) + tensors + 1)
        print(f"{count} processes: {sent / 1e6:.1f} MB, median {sorted(times)[STEPS // 2]:.3f} s")


def main() -> None:
    """Measure with two and with four processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=int, default=2_659_840)
    parser.add_argument("--tensors", type=int, default=1444)
    options = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "sdxl_train.ranks"])
    for count in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            arguments = (count, Path(folder) / "meeting", options.parameters, options.tensors)
            processes = [
                context.Process(target=exchange, args=(index, *arguments)) for index in range(count)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join()


if __name__ == "__main__":
    main()
