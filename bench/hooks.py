"""Time what plugins cost: starting with many installed, and telling observers of each step.

    python bench/hooks.py [--repeats 7] [--steps 2000]

Starting is ``sdxl-train --help`` as an installed package runs it (compiled), in processor seconds,
with distributions laid out on the import path that no run names; the counts take turns. Telling is
the event of a step with observers that count it, against the same loop without: the difference is
compared with a step of 100 ms.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy

from sdxl_train import hookspecs
from sdxl_train.events import Events

INSTALLED = (0, 10, 50)
OBSERVERS = (0, 1, 5)
STEP = 0.1
"""Seconds of the step that the cost is compared with."""

NOISE = '''
from sdxl_train import Field, Noise, hookimpl


class Noise{number}(Noise):
    """Noise {number}."""

    noise_{number}: float = Field(0.0, ge=0, description="Strength.")

    def build(self, schedule):
        return lambda noise, latents, timesteps, generator: noise


@hookimpl
def register_noises():
    return {{"noise-{number}": Noise{number}}}
'''


class Counter:
    """Hears of each step."""

    def __init__(self) -> None:
        self.steps = 0

    def step_finished(self, run: Any, step: Any) -> None:
        """Count it."""
        self.steps += 1


def lay_out(folder: Path, count: int) -> None:
    """Lay out distributions with a plugin each, as an installer does."""
    for number in range(count):
        (folder / f"noise_{number}.py").write_text(NOISE.format(number=number), encoding="utf-8")
        info = folder / f"noise_{number}-1.0.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.1\nName: noise-{number}\nVersion: 1.0\n"
        (info / "METADATA").write_text(head, encoding="utf-8")
        points = f"[sdxl_train]\nnoise-{number} = noise_{number}\n"
        (info / "entry_points.txt").write_text(points, encoding="utf-8")


def start(folder: Path, compiled: Path) -> float:
    """Give the processor seconds of help with the plugins of a folder installed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONPYCACHEPREFIX": str(compiled),
        "PYTHONDONTWRITEBYTECODE": "",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "sdxl_train", "--help"],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def tell(observers: int, steps: int) -> float:
    """Give the processor seconds of telling observers of one step."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    events = Events(manager, [], timeout=60)
    counters = [Counter() for _ in range(observers)]
    for number, counter in enumerate(counters):
        events.add_observer(f"counter {number}", counter)
    run, step = SimpleNamespace(), SimpleNamespace()
    before = time.process_time()
    for _ in range(steps):
        events.tell("step_finished", run=run, step=step)
    spent = time.process_time() - before
    assert all(counter.steps == steps for counter in counters)
    return spent / steps


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = {count: root / f"with-{count}" for count in INSTALLED}
        for count, folder in folders.items():
            folder.mkdir()
            lay_out(folder, count)
            start(folder, root / "compiled")
        starts: dict[int, list[float]] = {count: [] for count in INSTALLED}
        for _ in range(options.repeats):
            for count, folder in folders.items():
                starts[count].append(start(folder, root / "compiled"))
    print("| installed plugins that no run names | start, CPU s | more than none, ms each |")
    print("|---|---|---|")
    none = min(starts[0])
    for count, seconds in starts.items():
        each = f"{1000 * (min(seconds) - none) / count:.2f}" if count else ""
        print(f"| {count} | {min(seconds):.3f} | {each} |")
    tell(max(OBSERVERS), 100)
    print("\n| observers | a step's event, us | share of a step of 100 ms |")
    print("|---|---|---|")
    for count in OBSERVERS:
        best = min(tell(count, options.steps) for _ in range(options.repeats))
        print(f"| {count} | {1e6 * best:.1f} | {best / STEP:.4%} |")


if __name__ == "__main__":
    main()
