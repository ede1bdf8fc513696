"""How much memory two processes on one machine need for loading the same full-size model.

python -m bench.loading [--copied]

The file is as large as the full-size SDXL in bf16 and holds zeros, which a page cache keeps like
any other bytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sdxl_lora_plugins.model import Sdxl
from tests.sdxl.test_model_full_size import write_full_size

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

GB = 1e6  # of kB, in which the system counts


def load(path: Path, copied: bool, loaded: Barrier) -> None:
    """Load the model, wait for the others, and print what this process holds."""
    torch.set_num_threads(1)
    over = threading.Event()
    peaks = [0]

    def watch() -> None:
        while not over.wait(0.05):
            peaks.append(_kilobytes("status", "RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    options = Sdxl(pretrained_model_name_or_path=str(path), disable_mmap_load_safetensors=copied)
    model = options.build("cpu", torch.bfloat16)
    over.set()
    watching.join()
    loaded.wait()
    share, own = (_kilobytes("smaps_rollup", name) for name in ("Pss", "Anonymous"))
    parameters = sum(
        p.numel() for m in (model.denoiser, *model.text_encoders) for p in m.parameters()
    )
    print(
        f"{parameters / 1e9:.2f} billion parameters; own memory {own / GB:.2f} GB, at most "
        f"{max(peaks) / GB:.2f} GB; with its share of common pages {share / GB:.2f} GB",
        flush=True,
    )
    loaded.wait()


def _kilobytes(file: str, name: str) -> int:
    lines = Path(f"/proc/self/{file}").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """Load with one and with two processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--copied", action="store_true", help="disable_mmap_load_safetensors")
    copied = parser.parse_args().copied
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sdxl.safetensors"
        write_full_size(path, "BF16")
        for count in (1, 2):
            print(f"{path.stat().st_size / 1e9:.2f} GB, processes: {count}")
            loaded = context.Barrier(count)
            group = [
                context.Process(target=load, args=(path, copied, loaded)) for _ in range(count)
            ]
            for process in group:
                process.start()
            for process in group:
                process.join()


if __name__ == "__main__":
    main()
