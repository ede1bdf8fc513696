"""The peak of memory of a full-size training on the CPU: foretold, and measured, by option.

Each row is a setting. ``plan --memory`` foretells its peak; then the command trains some steps
with all encodings cached (unless the row says otherwise), watched from outside. Linux only.

    python -m bench.memory FOLDER FILE [--only NAME ...]     # measures, keeps the rows in FILE
    python -m bench.memory FOLDER FILE --table               # prints them
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from bench.full_size import command, prepare, run

ROWS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "bf16": ("bf16", 256, ()),
    "bf16, 512 x 512": ("bf16", 512, ()),
    "fp32": ("fp32", 256, ()),
    "fp32, 512 x 512": ("fp32", 512, ()),
    "gradient_checkpointing": ("bf16", 256, ("--gradient_checkpointing",)),
    "gradient_checkpointing, 512 x 512": ("bf16", 512, ("--gradient_checkpointing",)),
    "full_bf16": ("bf16", 256, ("--full_bf16",)),
    "fp8_base_unet": ("bf16", 256, ("--fp8_base_unet",)),
    "fp8_base": ("bf16", 256, ("--fp8_base",)),
    "fused_backward_pass": (
        "bf16",
        256,
        ("--fused_backward_pass", "--optimizer_type", "adafactor", "--max_grad_norm", "0"),
    ),
    "adafactor": ("bf16", 256, ("--optimizer_type", "adafactor", "--max_grad_norm", "0")),
    "lowram": ("bf16", 256, ("--lowram",)),
    "highvram": ("bf16", 256, ("--highvram",)),
    "mem_eff_attn": ("bf16", 256, ("--mem_eff_attn",)),
    "sdpa false": ("bf16", 256, ("--sdpa", "false")),
    "sdpa false, 512 x 512": ("bf16", 512, ("--sdpa", "false")),
    "encoders not cached": ("bf16", 256, ("--no-cache",)),
}
"""Precision, resolution and flags by name. ``--no-cache`` stands for no caching."""


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    known = json.loads(given.file.read_text(encoding="utf-8")) if given.file.exists() else {}
    if given.table:
        print_table(known)
        return
    for name in given.only:
        known[name] = measure(name, given)
        given.file.write_text(json.dumps(known, indent=2), encoding="utf-8")


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Foretell a row and measure it."""
    precision, resolution, flags = ROWS[name]
    model, data = prepare(given.folder, given.size, resolution)
    words = command(model, data, given.folder / "out", precision, resolution, flags)
    steps = ["--max_train_steps", str(given.steps)]
    plan = [words[0], "plan", *words[1:], *steps, "--memory", "--json"]
    done = subprocess.run(plan, check=True, capture_output=True, text=True)
    if "--no-cache" not in flags:
        run([*words, "--max_train_steps", "1"])
    foretold = json.loads(done.stdout)["memory"]["peak_bytes"]
    return {"foretold_gb": round(foretold / 1e9, 2), **run([*words, *steps])}


def print_table(known: dict[str, dict[str, Any]]) -> None:
    """Print the rows as a table in Markdown."""
    print("| setting | foretold | measured | difference | s/step |")
    print("|---|---|---|---|---|")
    for name in [name for name in ROWS if name in known]:
        row = known[name]
        off = 100 * (row["foretold_gb"] / row["peak_gb"] - 1)
        print(
            f"| {name} | {row['foretold_gb']:.2f} GB | {row['peak_gb']:.2f} GB | {off:+.0f} % "
            f"| {row['seconds_per_step']:.2f} |"
        )


if __name__ == "__main__":
    main()
