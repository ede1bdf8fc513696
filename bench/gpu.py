"""Measure training on a GPU, setting by setting, until the time is up; go on where it stopped.

Each setting is a call of `sdxl-train bench --json`. Its figures are added to FILE as soon as they
are there; settings that are in it already are passed over, so that several calls of less than ten
minutes each make the whole table. Run it unattended:

    python bench/gpu.py FILE [--minutes 9] [--only batch1] [--bench FLAGS ...]
    python bench/gpu.py FILE --table

It needs what `pip install -r requirements.txt` installs and no network; the row that compares
with a plain loop needs peft beside. A row that fails, for want of memory or of a kernel, is told
with its reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

COMMAND = str(Path(sys.executable).with_name("sdxl-train"))
_GRAPHS = ["--torch_compile", "--dynamo_mode", "reduce-overhead"]
LEVERS = {
    "plain": [],
    "waiting": ["--check_late", "false"],
    "unpinned": ["--pin_memory", "false"],
    "unfused": ["--optimizer_args", "fused=False"],
    "foreach": ["--optimizer_args", "foreach=True"],
    "channels-last": ["--channels_last"],
    "compile": ["--torch_compile"],
    "compile-dynamic": ["--torch_compile", "--dynamo_use_dynamic"],
    "compile-graphs": _GRAPHS,
    "compile-autotune": ["--torch_compile", "--dynamo_mode", "max-autotune-no-cudagraphs"],
    "fp8-matmul": ["--base_quantization", "fp8-matmul"],
    "fp8": ["--base_quantization", "fp8"],
    "int8": ["--base_quantization", "int8"],
    "nf4": ["--base_quantization", "nf4"],
    "checkpoint-0": ["--gradient_checkpointing", "--checkpoint_levels", "0"],
    "checkpoint-0-1": ["--gradient_checkpointing", "--checkpoint_levels", "0", "1"],
    "checkpoint-offload": ["--gradient_checkpointing", "--cpu_offload_checkpointing"],
    "fused-backward": ["--fused_backward_pass"],
    "full-bf16": ["--full_bf16"],
    "lean-attention": ["--mem_eff_attn"],
    "explicit-attention": ["--sdpa", "false"],
}
"""Options of which each has a row of its own, at batch 1 and rank 16."""
COMBINATIONS = {
    "compile-channels": ["--torch_compile", "--channels_last"],
    "compile-channels-fp8-matmul": [
        *("--torch_compile", "--channels_last", "--base_quantization", "fp8-matmul"),
    ],
    "graphs-channels": [*_GRAPHS, "--channels_last"],
    "graphs-channels-fp8-matmul": [
        *_GRAPHS,
        *("--channels_last", "--base_quantization", "fp8-matmul"),
    ],
    "compile-channels-checkpoint-0": [
        *("--torch_compile", "--channels_last", "--gradient_checkpointing"),
        *("--checkpoint_levels", "0"),
    ],
}
"""What may be fastest together, at every batch size and rank 16."""
BATCHES, RANKS = (1, 4, 8), (16, 64)
WARMUP = 4
"""Steps before the measured ones: CUDA graphs are recorded in the third."""


def settings() -> dict[str, list[str]]:
    """Give the flags of every row by its name, the most telling ones first."""
    rows = {"batch1-compare": ["--compare"]}
    for batch, rank, checkpointing in product(BATCHES, RANKS, (False, True)):
        name = f"batch{batch}-rank{rank}"
        flags = ["--train_batch_size", str(batch), "--network_dim", str(rank)]
        if checkpointing:
            flags.append("--gradient_checkpointing")
            name += "-checkpointing"
        rows[name] = flags
    rows |= {f"lever-{name}": flags for name, flags in LEVERS.items()}
    for batch, (name, flags) in product(BATCHES, COMBINATIONS.items()):
        rows[f"batch{batch}-{name}"] = ["--train_batch_size", str(batch), *flags]
    return rows


def main() -> None:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default="", help="rows whose names contain this")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--bench", nargs=argparse.REMAINDER, default=[], help="flags of all rows")
    given = parser.parse_args()
    found = json.loads(given.file.read_text(encoding="utf-8")) if given.file.exists() else {}
    if given.table:
        print("\n".join(table(found)))
        return
    missing = {
        name: flags
        for name, flags in settings().items()
        if name not in found and given.only in name
    }
    until = time.monotonic() + given.minutes * 60
    for index, (name, flags) in enumerate(missing.items()):
        left = until - time.monotonic()
        if left <= 0:
            break
        figures = measure(["--warmup", str(WARMUP), *flags, *given.bench], left)
        if figures is None and index:  # the next call has the time for it
            break
        found[name] = figures or {"error": f"not done in {given.minutes:g} minutes"}
        print(name, found[name].get("error") or found[name]["ours"]["seconds_per_step"], flush=True)
        given.file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    rows = settings().keys() - found.keys()
    print(f"{len(found)} rows are there, {len(rows)} are missing")


def measure(flags: list[str], seconds: float) -> dict[str, Any] | None:
    """Give the figures of a row, or why there are none: out of memory is a result too.

    None if it was not done in time.
    """
    try:
        done = subprocess.run(
            [COMMAND, "bench", "--json", *flags], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def table(found: dict[str, Any]) -> list[str]:
    """Give the machine, and the rows as Markdown.

    ``gain`` is the s/it of the plain settings of that batch size over the row's.
    """
    sound = [figures for figures in found.values() if "error" not in figures]
    lines = []
    if sound:
        lines += [str(sound[0]["machine"]), str(sound[0]["versions"]), ""]
    lines += [
        "| setting | s/it | img/s | TFLOP/s | MFU | GB | gain | plain loop / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in found.items():
        if "error" in figures:
            lines.append(f"| {name} | {figures['error']} | | | | | | |")
            continue
        ours = figures["ours"]
        batch = figures["settings"].get("train_batch_size", 1)
        plain = found.get(f"batch{batch}-rank16", {}).get("ours")
        gain = f"{plain['seconds_per_step'] / ours['seconds_per_step']:.2f}" if plain else ""
        ratio = "" if figures["ratio"] is None else f"{figures['ratio']:.2f}"
        lines.append(
            f"| {name} | {ours['seconds_per_step']:.4g} | {ours['images_per_second']:.3g} | "
            f"{ours['tflops']:.3g} | {ours['mfu']:.1%} | {ours['peak_bytes'] / 1e9:.2f} | "
            f"{gain} | {ratio} |"
        )
    return lines


if __name__ == "__main__":
    main()
