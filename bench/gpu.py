"""Measure training on a GPU, setting by setting, until the time is up; go on where it stopped.

Each setting is a call of `sdxl-train bench --json`. Its figures are added to FILE as soon as they
are there; settings that are in it already are passed over, so that several calls of less than ten
minutes each make the whole table. Run it unattended:

    python bench/gpu.py FILE [--minutes 9] [--only batch1] [--bench FLAGS ...]
    python bench/gpu.py FILE --table
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
LEVERS = {
    "plain": [],
    "compile": ["--torch_compile"],
    "full-bf16": ["--full_bf16"],
    "fp8": ["--fp8_base_unet"],
    "lean-attention": ["--mem_eff_attn"],
}
"""Options of which each has a row of its own, at batch 1 and rank 16."""


def settings() -> dict[str, list[str]]:
    """Give the flags of every row by its name, the most telling ones first."""
    rows = {"batch1-compare": ["--compare"]}
    for batch, rank, checkpointing in product((1, 4, 8), (16, 64), (False, True)):
        flags = ["--train_batch_size", str(batch), "--network_dim", str(rank)]
        name = f"batch{batch}-rank{rank}"
        if checkpointing:
            flags.append("--gradient_checkpointing")
            name += "-checkpointing"
        rows[name] = flags
    return rows | {f"lever-{name}": flags for name, flags in LEVERS.items()}


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
    until = time.monotonic() + given.minutes * 60
    for name, flags in settings().items():
        if name in found or given.only not in name:
            continue
        left = until - time.monotonic()
        if left <= 0:
            break
        figures = measure([*flags, *given.bench], left)
        if figures is None:  # the next call has the time for it
            break
        found[name] = figures
        print(name, found[name].get("error") or found[name]["ours"]["seconds_per_step"])
        given.file.write_text(json.dumps(found, indent=1), encoding="utf-8")


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
    """Give the rows as Markdown."""
    lines = ["| setting | s/it | img/s | MFU | GB | ratio |", "|---|---|---|---|---|---|"]
    for name, figures in found.items():
        if "error" in figures:
            lines.append(f"| {name} | {figures['error']} | | | | |")
            continue
        ours = figures["ours"]
        ratio = "" if figures["ratio"] is None else f"{figures['ratio']:.2f}"
        lines.append(
            f"| {name} | {ours['seconds_per_step']:.4g} | {ours['images_per_second']:.3g} | "
            f"{ours['mfu']:.1%} | {ours['peak_bytes'] / 1e9:.2f} | {ratio} |"
        )
    return lines


if __name__ == "__main__":
    main()
