"""What the framework adds to the maths of a step: loop, observers, record, data.

A tiny SDXL is trained by the real thing, with everything that is on by default. After each of its
steps a bare loop does the same maths, with a model and a network of its own. Both are timed in
seconds of the processor, which other programs do not lengthen as they do the time of the clock.

    python bench/overhead.py [--steps 200] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

import sdxl_train
from sdxl_lora_plugins.made_up import MadeUpSdxl
from sdxl_lora_plugins.networks import Lora

SIDE = 64
WARMUP = 5


class BareLoop:
    """The maths of a step and nothing else, on a model and a network of its own."""

    def __init__(self) -> None:
        options = MadeUpSdxl(pretrained_model_name_or_path="tiny", network_train_unet_only=True)
        self.model = options.build("cpu", torch.float32)
        adapter = Lora(network_dim=4).build(self.model)
        self.trained = [p for group in adapter.groups() for p in group.parameters]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        self.latents = self.model.encode_images(torch.zeros(1, 3, SIDE, SIDE))
        size = torch.tensor([[SIDE, SIDE]])
        self.condition = {
            **self.model.encode_text(["a"]),
            "original_size": size,
            "crop_top_left": torch.zeros_like(size),
            "target_size": size,
        }

    def step(self) -> None:
        """Train a step."""
        timesteps = torch.randint(0, 1000, (1,))
        noise = torch.randn_like(self.latents)
        noisy = self.model.schedule.add_noise(self.latents, noise, timesteps)
        predicted = self.model.predict(noisy, timesteps, self.condition)
        loss = F.mse_loss(predicted, noise)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        if not torch.isfinite(loss):
            raise RuntimeError("the loss is not finite")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Pairs:
    """Processor seconds of each step of the framework and of the bare step that follows it."""

    def __init__(self, bare: BareLoop) -> None:
        self.bare = bare
        self.steps: list[float] = []
        self.bare_steps: list[float] = []
        self.phases: dict[str, float] = {}
        self._began = self._mark = 0.0

    def started(self) -> None:
        """Begin, where the first step begins."""
        self._began = self._mark = time.process_time()

    def lap(self, phase: str) -> None:
        """Take the end of a phase; all that comes before the next step's data is of this step."""
        now = time.process_time()
        if phase == "data":
            # A step ends where the next one asks for its data, whose cost falls to the next.
            self.steps.append(self._mark - self._began)
            self.bare.step()
            after = time.process_time()
            self.bare_steps.append(after - now)
            self._began = after - (now - self._mark)
            now, spent = after, now - self._mark
        else:
            spent = now - self._mark
        if phase != "saving":
            self.phases[phase] = self.phases.get(phase, 0.0) + spent
        else:
            self._began += spent
        self._mark = now


def measure(steps: int) -> dict[str, Any]:
    """Train so many steps both ways; give medians of their seconds, and the ratio of the sums."""
    pairs = Pairs(BareLoop())
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images" / f"{steps + WARMUP + 1}_picture"
        images.mkdir(parents=True)
        Image.new("RGB", (SIDE, SIDE), (9, 99, 199)).save(images / "one.png")
        (images / "one.txt").write_text("a", encoding="utf-8")
        sdxl_train.train(
            {
                "train_data_dir": str(images.parent),
                "output_dir": f"{folder}/out",
                "resolution": SIDE,
                "network_dim": 4,
                "network_train_unet_only": True,
                "cache_latents": True,
                "cache_text_encoder_outputs": True,
                "learning_rate": 1e-4,
                "max_train_steps": steps + WARMUP + 1,
                "seed": 0,
            },
            components=[MadeUpSdxl(pretrained_model_name_or_path="tiny")],
            events={"run_started": pairs.started},
            lap=pairs.lap,
        )
    ours, bare = pairs.steps[WARMUP + 1 :], pairs.bare_steps[WARMUP:-1]
    pairwise = sorted(a / b for a, b in zip(ours, bare, strict=True))
    # The order statistics between which the median lies with 95 % (normal approximation of the
    # binomial distribution; Conover 1999, section 3.2).
    middle, reach = len(pairwise) / 2, 0.98 * len(pairwise) ** 0.5
    low, high = int(middle - reach), math.ceil(middle + reach)
    return {
        "steps": len(ours),
        "step_s": statistics.median(ours),
        "bare_step_s": statistics.median(bare),
        "ratio": statistics.median(pairwise),
        "ratio_at_least": pairwise[max(low, 0)],
        "ratio_at_most": pairwise[min(high, len(pairwise) - 1)],
        "ratio_of_sums": sum(ours) / sum(bare),
        "phases_s": {n: s / (steps + WARMUP + 1) for n, s in pairs.phases.items()},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.steps)
    if given.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        print(f"{name:<16}{value if not isinstance(value, float) else f'{value:.5g}'}")


if __name__ == "__main__":
    main()
