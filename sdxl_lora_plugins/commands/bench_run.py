"""The benchmark: rounds of real runs, and of the plain loop in turns with them."""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
import re
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from PIL import Image

from sdxl_lora_plugins.commands.bench import REPLACED
from sdxl_lora_plugins.commands.bench_figures import (
    DTYPES,
    Figures,
    Stopwatch,
    Work,
    ceiling,
    forget_peak,
    peak,
    training_flops,
)
from sdxl_lora_plugins.made_up import MadeUpSdxl
from sdxl_train import __version__, train

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sdxl_lora_plugins.commands.bench import Bench
    from sdxl_lora_plugins.commands.bench_figures import StepTimes
    from sdxl_lora_plugins.commands.bench_plain import PlainLoop
    from sdxl_train import Run

_log = logging.getLogger(__name__)

_PACKAGES: Final = ("torch", "diffusers", "transformers", "accelerate", "peft")
_TEXT: Final = ("network_train_unet_only", "network_train_text_encoder_only")


def run_bench(options: Bench) -> None:
    """Measure, and print what was measured."""
    given = dict(options.training)
    idle = sorted(REPLACED & given.keys())
    if idle:
        _log.warning("a benchmark has its own %s", ", ".join(idle))
    settings = {
        **_defaults(options, given),
        **{name: value for name, value in given.items() if name not in REPLACED},
    }
    ours, plain = Rounds(), Rounds()
    for _ in range(options.rounds if options.compare else 1):
        with tempfile.TemporaryDirectory(prefix="sdxl-train-bench-") as folder:
            work = _measure_run(options, settings, Path(folder), ours)
        if options.compare:
            from sdxl_lora_plugins.commands.bench_plain import PlainLoop

            _measure_plain(options, PlainLoop(work, tiny=options.tiny), plain)
    report = Report.of(work, ours, plain)
    print(json.dumps(report.as_json(), indent=2) if options.json else report.text())


@dataclass
class Rounds:
    """What several turns of a loop gave: the seconds of each measured step, the peak of memory."""

    steps: list[StepTimes] = field(default_factory=list)
    peak: int | None = None

    def add(self, stopwatch: Stopwatch, warmup: int) -> None:
        """Add a turn, without its first steps, and without the last, in which it ends."""
        self.steps += stopwatch.steps()[warmup:-1]
        self.peak = max(self.peak or 0, peak(stopwatch.device) or 0) or None


class Watch:
    """Watches one run from its first step on.

    Attributes:
        work: What it does; the run itself is let go.
    """

    def __init__(self) -> None:
        self.work: Work
        self.stopwatch: Stopwatch

    def started(self, run: Run) -> None:
        """Begin to measure."""
        device = run.assembly.parameters[0].device
        self.work = Work(config=run.config, resolution=run.resolution, device=device)
        forget_peak(device)
        self.stopwatch = Stopwatch(device)

    def lap(self, phase: str) -> None:
        """Take the end of a phase."""
        self.stopwatch.lap(phase)


def _defaults(options: Bench, given: Mapping[str, Any]) -> dict[str, Any]:
    """Give the settings of a benchmark that were not given."""
    side = 1024 if torch.cuda.is_available() else 256
    defaults: dict[str, Any] = {
        "mixed_precision": "bf16",
        "resolution": 64 if options.tiny else side,
        "network_dim": 16,
        "network_alpha": 16,
        "learning_rate": 1e-4,
        "seed": 0,
        "cache_latents": True,
    }
    if not any(name.startswith("text_encoder_lr") or name in _TEXT for name in given):
        defaults |= {"network_train_unet_only": True, "cache_text_encoder_outputs": True}
    return defaults


def _measure_run(options: Bench, settings: Mapping[str, Any], folder: Path, rounds: Rounds) -> Work:
    """Train once, for real but for what it is trained on."""
    steps = _all_steps(options)
    merged = {
        **settings,
        "train_data_dir": str(_write_images(folder, settings, steps)),
        "output_dir": str(folder / "output"),
        "output_name": "bench",
        "max_train_steps": steps,
    }
    watch = Watch()
    model = MadeUpSdxl(pretrained_model_name_or_path="tiny" if options.tiny else "full")
    with _memory_let_go():
        train(merged, components=[model], events={"run_started": watch.started}, lap=watch.lap)
        rounds.add(watch.stopwatch, options.warmup)
    return watch.work


def _all_steps(options: Bench) -> int:
    return options.warmup + options.steps + 1


def _measure_plain(options: Bench, loop: PlainLoop, rounds: Rounds) -> None:
    """Train by the plain loop once."""
    with _memory_let_go():
        forget_peak(loop.work.device)
        stopwatch = Stopwatch(loop.work.device)
        loop.train(_all_steps(options), stopwatch)
        rounds.add(stopwatch, options.warmup)


@contextmanager
def _memory_let_go() -> Iterator[None]:
    """Leave no model behind: the next one needs its room."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _write_images(folder: Path, settings: Mapping[str, Any], steps: int) -> Path:
    """Write the pictures of a step, which an epoch repeats for each step; give their folder."""
    width, height = _size(settings["resolution"])
    images = _number(settings, "train_batch_size") * _number(
        settings, "gradient_accumulation_steps"
    )
    place = folder / "images" / f"{steps}_made-up"
    place.mkdir(parents=True)
    for index in range(images):
        shade = Image.new("RGB", (width, height), (index * 37 % 256, index % 256, 128))
        shade.save(place / f"{index}.png", compress_level=1)
        (place / f"{index}.txt").write_text(f"picture {index}\n", encoding="utf-8")
    return folder / "images"


def _number(settings: Mapping[str, Any], name: str) -> int:
    """Read a count; what is none is for the run to refuse."""
    match = re.fullmatch(r"\d{1,4}", _typed(settings.get(name, 1)))
    return max(int(match[0]), 1) if match else 1


def _size(resolution: object) -> tuple[int, int]:
    """Read ``width`` or ``width,height``; what is neither is for the run to refuse."""
    sides = [int(side) for side in re.findall(r"\d{1,5}", _typed(resolution))] or [64]
    return sides[0], sides[-1]


def _typed(value: object) -> str:
    """Give a value of a setting as it was typed."""
    return str(getattr(value, "value", value))


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that was measured.

    Attributes:
        ratio: Seconds of the plain loop's step for one of this program's; above 1 it is slower.
    """

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    tflop_per_step: float
    ceiling_tflops: float
    ours: Figures
    plain: Figures | None
    ratio: float | None

    @classmethod
    def of(cls, work: Work, ours: Rounds, plain: Rounds) -> Report:
        """Make the report of the rounds."""
        size = work.config.model.pretrained_model_name_or_path
        flops = training_flops(size, work.resolution, work.rank) * work.images
        precision = work.config.training.mixed_precision
        top = ceiling(work.device, DTYPES[precision])

        def figures(rounds: Rounds) -> Figures:
            return Figures.of(
                rounds.steps, peak=rounds.peak, images=work.images, flops=flops, ceiling=top
            )

        own = figures(ours)
        other = figures(plain) if plain.steps else None
        return cls(
            machine=_machine(work.device),
            versions=_versions(),
            settings=work.settings(),
            tflop_per_step=flops / 1e12,
            ceiling_tflops=top / 1e12,
            ours=own,
            plain=other,
            ratio=other.seconds_per_step / own.seconds_per_step if other else None,
        )

    def as_json(self) -> dict[str, Any]:
        """Give it as plain JSON values."""
        return {**asdict(self), "plain": self.plain and asdict(self.plain)}

    def text(self) -> str:
        """Tell it to people."""
        rows = {
            "machine": ", ".join(f"{name} {value}" for name, value in self.machine.items()),
            "versions": ", ".join(f"{name} {value}" for name, value in self.versions.items()),
            "settings": ", ".join(f"{name} {value}" for name, value in self.settings.items()),
            "work": f"{self.tflop_per_step:.4g} TFLOP a step; a large matrix product reaches "
            f"{self.ceiling_tflops:.3g} TFLOP/s",
        }
        lines = [f"{name:<10}{text}" for name, text in rows.items()]
        for name, figures in (("sdxl-train", self.ours), ("plain loop", self.plain)):
            if figures is not None:
                first, second = figures.lines()
                lines += [f"{name:<10} {first}", f"{'':<10} {second}"]
        if self.ratio is not None:
            lines.append(f"{'ratio':<10} {self.ratio:.3f} (plain loop / sdxl-train, s/it)")
        return "\n".join(lines)


def _machine(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    facts = {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    if hasattr(os, "getloadavg"):  # not on Windows
        facts["load"] = round(os.getloadavg()[0], 2)
    return facts


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in _PACKAGES if find_spec(name) is not None}
    return {"sdxl-train": __version__, "python": platform.python_version(), **packages}
