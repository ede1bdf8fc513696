"""How long the exchange of the gradients takes, and how many bytes it sends, over gloo on the CPU.

python bench/ranks.py [--ranks 16 64 128] [--processes 2 4]

The parameters are those of a LoRA of the U-Net of SDXL. Beside the bytes that a process hands over,
the system's count of what went through the local network: all processes together, both ways.
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

from sdxl_train.process_group import join
from sdxl_train.process_options import ProcessOptions

STEPS = 5
PARAMETERS_PER_RANK = 2_659_840
TENSORS = 1444


def exchange(index: int, count: int, meeting: Path, rank: int, views: bool) -> None:
    """Add gradients up a few times; the first process prints the median time."""
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(count))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=index, world_size=count)
    ranks = join(ProcessOptions(ddp_gradient_as_bucket_view=views))
    size = rank * PARAMETERS_PER_RANK // TENSORS
    weights = [torch.zeros(size, requires_grad=True) for _ in range(TENSORS)]
    times = []
    before = _bytes_sent()
    for _ in range(STEPS):
        for weight in weights:
            weight.grad = torch.full_like(weight, 1.0 + index)
        ranks.gather(None)  # all begin together
        began = time.perf_counter()
        ranks.add_up(weights, [torch.zeros(1)])
        times.append(time.perf_counter() - began)
    ranks.gather(None)
    total = sum(range(1, count + 1))
    assert all(weight.grad is not None and weight.grad[0] == total for weight in weights)
    if index == 0:
        handed = 4 * (size * TENSORS + TENSORS + 1)
        travelled = (_bytes_sent() - before) / STEPS
        print(
            f"rank {rank}, {count} processes{', bucket view' if views else ''}: "
            f"{handed / 1e6:.1f} MB handed over, {travelled / 1e6:.1f} MB sent by all, "
            f"median {sorted(times)[STEPS // 2]:.3f} s",
            flush=True,
        )


def _bytes_sent() -> int:
    """Give the bytes that went out through the loopback device since the start of the system."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text(encoding="utf-8"))


def main() -> None:
    """Measure with each number of processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "sdxl_train.process_group"])
    cases = [(c, r, v) for c in options.processes for r in options.ranks for v in (False, True)]
    for count, rank, views in cases:
        with tempfile.TemporaryDirectory() as folder:
            meeting = Path(folder) / "meeting"
            processes = [
                context.Process(target=exchange, args=(index, count, meeting, rank, views))
                for index in range(count)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join()


if __name__ == "__main__":
    main()
