"""The peak of memory of a full-size training on the CPU: foretold, and measured, by option.

Each row is a setting. ``plan --memory`` foretells its peak; then the command trains some steps,
watched from outside. Linux only. The factor of a step's time is against the row ``plain`` of the
same session, measured with the machine to itself.

    python -m bench.memory FOLDER FILE [--only NAME ...]     # measures, keeps the rows in FILE
    python -m bench.memory FOLDER FILE --do plan             # only foretells
    python -m bench.memory FOLDER FILE --table               # prints them
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.full_size import command, prepare, run
from sdxl_train.data.listing import CACHE_FOLDER


@dataclass(frozen=True)
class Row:
    """A setting.

    Attributes:
        flags: Beside those that all rows have; see :func:`bench.full_size.command`.
        precision: ``bf16`` or ``fp32``.
        resolution: Side of the images.
        caches: What is on the disk at the start: all encodings, none of them, or none is kept.
    """

    flags: str = ""
    precision: str = "bf16"
    resolution: int = 256
    caches: Literal["complete", "empty", "none"] = "complete"


ROWS: dict[str, Row] = {
    "plain": Row(),
    "512 x 512": Row(resolution=512),
    "fp32": Row(precision="fp32"),
    "fp32, 512 x 512": Row(precision="fp32", resolution=512),
    "caches to be filled": Row(caches="empty"),
    "caches to be filled, 512 x 512": Row(resolution=512, caches="empty"),
    "caches to be filled, 1024 x 1024, gradient_checkpointing": Row(
        "--gradient_checkpointing", resolution=1024, caches="empty"
    ),
    "1024 x 1024, gradient_checkpointing": Row("--gradient_checkpointing", resolution=1024),
    "fp32, caches to be filled": Row(precision="fp32", caches="empty"),
    "nothing cached": Row(caches="none"),
    "nothing cached, 512 x 512": Row(resolution=512, caches="none"),
    "batch of 4": Row("--train_batch_size 4"),
    "gradient_accumulation_steps 2": Row("--gradient_accumulation_steps 2"),
    "gradient_checkpointing": Row("--gradient_checkpointing"),
    "gradient_checkpointing, 512 x 512": Row("--gradient_checkpointing", resolution=512),
    "checkpoint_levels 0 1, 512 x 512": Row(
        "--gradient_checkpointing --checkpoint_levels 0 1", resolution=512
    ),
    "full_bf16": Row("--full_bf16"),
    "network_dim 128": Row("--network_dim 128"),
    "network_dim 128, full_bf16": Row("--network_dim 128 --full_bf16"),
    "adafactor": Row("--optimizer_type adafactor --max_grad_norm 0"),
    "fused_backward_pass, adafactor": Row(
        "--fused_backward_pass --optimizer_type adafactor --max_grad_norm 0"
    ),
    "AdamW8bit": Row("--optimizer_type AdamW8bit"),
    "network_dim 128, AdamW8bit": Row("--network_dim 128 --optimizer_type AdamW8bit"),
    "ema_decay": Row("--ema_decay 0.999"),
    "lowram": Row("--lowram"),
    "highvram": Row("--highvram"),
    "mem_eff_attn": Row("--mem_eff_attn"),
    "sdpa false": Row("--sdpa false"),
    "sdpa false, 512 x 512": Row("--sdpa false", resolution=512),
    "channels_last": Row("--channels_last"),
    "disable_mmap_load_safetensors": Row("--disable_mmap_load_safetensors"),
    "fp8_base_unet": Row("--fp8_base_unet"),
    "fp8_base": Row("--fp8_base"),
    "fp8_base, caches to be filled": Row("--fp8_base", caches="empty"),
    "base_quantization int8": Row("--base_quantization int8"),
    "base_quantization nf4": Row("--base_quantization nf4"),
}
"""The settings by name."""


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+", choices=ROWS)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--do", nargs="+", choices=("plan", "run"), default=("plan", "run"))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    known = json.loads(given.file.read_text(encoding="utf-8")) if given.file.exists() else {}
    if given.table:
        print_table(known)
        return
    for name in given.only or ROWS:
        known[name] = {**known.get(name, {}), **measure(ROWS[name], given)}
        print(name, known[name], flush=True)
        given.file.write_text(json.dumps(known, indent=2), encoding="utf-8")


def measure(row: Row, given: argparse.Namespace) -> dict[str, Any]:
    """Foretell a row, and measure it."""
    model, data = prepare(given.folder, given.size, row.resolution)
    flags = [*row.flags.split(), *(["--no-cache"] if row.caches == "none" else [])]
    words = command(model, data, given.folder / "out", row.precision, row.resolution, flags)
    words += ["--max_train_steps", str(given.steps)]
    # An encoding serves those runs that would make the same one, and the next one takes its place.
    filled, form = data / "filled-for", f"{row.precision} {row.flags}"
    if row.caches == "empty":
        for cache in data.rglob(CACHE_FOLDER):
            shutil.rmtree(cache)
        filled.unlink(missing_ok=True)
    elif row.caches == "complete" and (not filled.exists() or filled.read_text() != form):
        run([*words, "--max_train_steps", "1"])
        filled.write_text(form)
    found: dict[str, Any] = {}
    if "plan" in given.do:
        plan = [words[0], "plan", *words[1:], "--memory", "--json"]
        done = subprocess.run(plan, check=True, capture_output=True, text=True)
        found["foretold"] = json.loads(done.stdout)["memory"]
    if "run" in given.do:
        found |= {"load": os.getloadavg()[0], **run(words)}
    return found


def print_table(known: dict[str, dict[str, Any]]) -> None:
    """Print the rows as a table in Markdown."""
    print("| setting | foretold | measured | difference | s/step | factor |")
    print("|---|---|---|---|---|---|")
    plain = known["plain"]["seconds_per_step"]
    for name in [name for name in ROWS if name in known]:
        row = known[name]
        foretold = row["foretold"]["peak_bytes"] / 1e9
        off = 100 * (foretold / row["peak_gb"] - 1)
        print(
            f"| {name} | {foretold:.2f} GB | {row['peak_gb']:.2f} GB | {off:+.0f} % "
            f"| {row['seconds_per_step']:.2f} | {row['seconds_per_step'] / plain:.2f} |"
        )


if __name__ == "__main__":
    main()
