"""From the command to its first step with a tiny model, against the peer's imports alone.

sd-scripts imports torch, accelerate, transformers and diffusers' pipelines before it reads its
options; what else it imports is left out here. In turns: this program's run to the end of its first
step, all encodings cached, and a process that imports those. Seconds of the clock, and of the
processor, which other work on the machine disturbs less. Linux only.

    python -m bench.start FOLDER [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.full_size import command, prepare, run

IMPORTS = """
import torch, accelerate, transformers
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
"""


def main() -> None:
    """Measure in turns and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    model, data = prepare(given.folder, "tiny", 64)
    words = [
        *command(model, data, given.folder / "out", "bf16", 64, []),
        *("--max_train_steps", "1"),
    ]
    run(words)  # fills the caches
    rounds = [_round(words) for _ in range(given.rounds)]
    ratios = {
        kind: statistics.median(
            each[f"first_step_{kind}"] / each[f"imports_{kind}"] for each in rounds
        )
        for kind in ("seconds", "cpu_seconds")
    }
    if given.json:
        print(json.dumps({"rounds": rounds, "ratios": ratios}, indent=2))
        return
    for each in rounds:
        print(", ".join(f"{name} {value:.2f}" for name, value in each.items()))
    for kind, ratio in ratios.items():
        print(f"median ratio of {kind}: {ratio:.2f}")


def _round(words: list[str]) -> dict[str, float]:
    before = _processor()
    first = float(run(words)["seconds_to_first_step"])
    between = _processor()
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
    return {
        "first_step_seconds": first,
        "imports_seconds": time.monotonic() - began,
        # To the end of the run: what comes after the first step is in it.
        "first_step_cpu_seconds": between - before,
        "imports_cpu_seconds": _processor() - between,
    }


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
