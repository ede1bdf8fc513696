"""Train a full-size SDXL with the command, and measure it from outside: start-up, memory, steps.

Makes a base model of random weights in a single file (7 GB, kept in FOLDER), one picture and its
caches. Then, for each precision: the seconds from the command to its first step with the caches
made, the peak of its memory, all of it and what is no page of a file, and its s/it. Linux only.

    python bench/full_size.py FOLDER [--precision bf16 fp32] [--resolution 256] [--steps 8] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMAND = str(Path(sys.executable).with_name("sdxl-train"))
MAKE = """
import sys, torch
from pathlib import Path
from sdxl_lora_plugins.made_up_parts import fill_in, full_parts
from sdxl_lora_plugins.model import SDXL, TINY
from sdxl_train.ldm.tiny import tiny_parts, write_file
size, path = sys.argv[1:]
parts = full_parts("sdpa") if size == "full" else tiny_parts(SDXL, TINY)
for part in (parts.unet, *parts.text_encoders, parts.vae):
    fill_in(part, torch.device("cpu"), torch.bfloat16)
write_file(Path(path), SDXL, parts, "epsilon", torch.bfloat16)
"""
_PRECISIONS = {"bf16": "bf16", "fp32": "no"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", nargs="+", choices=_PRECISIONS, default=["bf16"])
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    model, data = prepare(given.folder, given.size, given.resolution)
    found = {}
    for precision in given.precision:
        out = given.folder / "out"
        words = command(model, data, out, precision, given.resolution, given.flags)
        caching = run([*words, "--max_train_steps", "1"])
        found[precision] = {
            **run([*words, "--max_train_steps", str(given.steps)]),
            "with_caching": caching,
        }
    if given.json:
        print(json.dumps(found, indent=2))
        return
    for precision, figures in found.items():
        print(precision, ", ".join(f"{name} {value}" for name, value in figures.items()))


def prepare(folder: Path, size: str, resolution: int) -> tuple[Path, Path]:
    """Give a model file and a folder of data, made where they are not there yet."""
    model = folder / f"{size}.safetensors"
    data = folder / f"data-{resolution}" / "4_made-up"
    data.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        subprocess.run([sys.executable, "-c", MAKE, size, str(model)], check=True)
    if not (data / "one.png").exists():
        Image.radial_gradient("L").convert("RGB").resize((resolution,) * 2).save(data / "one.png")
        (data / "one.txt").write_text("a picture", encoding="utf-8")
    return model, data.parent


def command(
    model: Path, data: Path, out: Path, precision: str, resolution: int, flags: Sequence[str]
) -> list[str]:
    """Give the words of the command; ``--no-cache`` among the flags leaves caching out."""
    caches = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    return [
        *(COMMAND, "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data)),
        *("--output_dir", str(out), "--output_name", precision, "--overwrite"),
        *("--resolution", str(resolution), "--min_bucket_reso", "32"),
        *("--network_dim", "16", "--network_alpha", "16", "--network_train_unet_only"),
        *([] if "--no-cache" in flags else caches),
        *("--mixed_precision", _PRECISIONS[precision], "--learning_rate", "1e-4", "--seed", "0"),
        *("--max_data_loader_n_workers", "0", "--console_log_simple"),
        *(flag for flag in flags if flag != "--no-cache"),
    ]


def run(words: list[str]) -> dict[str, Any]:
    """Run the command; watch its memory, and hear of its first step."""
    began = time.monotonic()
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    output = process.stderr.fileno()
    os.set_blocking(output, False)
    log, first, peak, anonymous = b"", None, 0, 0
    while process.poll() is None:
        time.sleep(0.1)
        log += _read(output)
        if first is None and b"step 1/" in log:
            first = time.monotonic() - began
        status = _status(process.pid)
        peak = max(peak, status.get("VmHWM", 0))
        anonymous = max(anonymous, status.get("RssAnon", 0))
    log += _read(output)
    text = log.decode()
    if process.returncode:
        raise SystemExit(text)
    record = json.loads(_record(words).read_text(encoding="utf-8"))
    return {
        "seconds_to_first_step": round(first or time.monotonic() - began, 2),
        "peak_gb": round(peak / 1e6, 2),
        "peak_anonymous_gb": round(anonymous / 1e6, 2),
        "seconds_per_step": record["speed"]["seconds_per_step"],
    }


def _record(words: list[str]) -> Path:
    folder, name = (words[words.index(flag) + 1] for flag in ("--output_dir", "--output_name"))
    return Path(folder) / f"{name}.run.json"


def _read(output: int) -> bytes:
    try:
        return os.read(output, 1 << 20)
    except BlockingIOError:
        return b""


def _status(pid: int) -> dict[str, int]:
    """Read the kilobytes of /proc/PID/status."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split()[:2] for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) for name, value in pairs}


if __name__ == "__main__":
    main()
