"""Draw a learning-rate schedule: ``sdxl-train components scheduler:NAME --plot``."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_train.counts import DEFAULT_MAX_STEPS
from sdxl_train.errors import UserError
from sdxl_train.options import Setting
from sdxl_train.protocols import StepPlan
from sdxl_train.resolve import Resolver
from sdxl_train.settings import from_mapping, texts_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdxl_train.cli.invocation import Invocation
    from sdxl_train.config import RunConfig
    from sdxl_train.registry import Entry, Registry

OPTIONS = ("max_train_steps", "learning_rate", "lr_scheduler_args")
"""What decides a curve beside the schedule's own flags."""


def plot(invocation: Invocation, registry: Registry, entries: Sequence[Entry]) -> None:
    """Draw the schedule that is named, in the terminal or into a PNG.

    Raises:
        UserError: If it is no schedule, or its options are wrong.
    """
    setting = invocation.settings.pop("plot")
    if len(entries) != 1 or entries[0].kind.name != "scheduler":
        remedy = "write for example: sdxl-train components scheduler:cosine --plot"
        raise UserError.of(setting.place, "draws one learning-rate schedule", remedy)
    (entry,) = entries
    invocation.refuse_flags("components --plot", (*OPTIONS, *entry.flags))
    target = _target(setting)
    config = _config(invocation, registry, entry)
    rates = learning_rates(config)
    given = "learning_rate" in invocation.settings
    rate = f"learning rate {config.optimizer.learning_rate:g}" if given else "share of the rate"
    title = f"{entry.name}: {rate} over {len(rates)} steps"
    if target is None:
        _draw(rates, title)
    else:
        _write(rates, title, target)
        print(f"wrote {target}")


def learning_rates(config: RunConfig) -> list[float]:
    """Give the learning rate of each optimizer step."""
    import torch

    whole = StepPlan(total=config.training.max_train_steps or DEFAULT_MAX_STEPS)
    scheduler = config.scheduler
    steps = StepPlan(
        total=whole.total,
        warmup=whole.count(scheduler.lr_warmup_steps),
        decay=whole.count(scheduler.decay()),
    )
    optimizer = torch.optim.SGD(
        [torch.nn.Parameter(torch.zeros(1))], lr=config.optimizer.learning_rate
    )
    schedule = scheduler.build(optimizer, steps)
    rates = []
    for _ in range(steps.total):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return rates


def _target(setting: Setting) -> Path | None:
    """Give the file to write; None for the terminal."""
    words = [text for text in texts_of(setting) if text not in ("", "True", "true")]
    if not words:
        return None
    if len(words) > 1 or not words[0].lower().endswith(".png"):
        raise UserError.of(
            setting.place, f"got '{' '.join(words)}', expected a .png file or nothing"
        )
    if find_spec("matplotlib") is None:
        raise UserError.of(
            setting.place,
            "a PNG needs the package 'matplotlib', which is not installed",
            'pip install "sdxl-train[plot]", or leave the file out to draw in the terminal',
        )
    return Path(words[0]).expanduser()


def _config(invocation: Invocation, registry: Registry, entry: Entry) -> RunConfig:
    """Check the options of the schedule as a run that uses it would."""
    needed = from_mapping(
        {"pretrained_model_name_or_path": "model", "output_dir": "output", "learning_rate": 1.0}
    )
    chosen = Setting(value=entry.qualified, place=f"scheduler:{entry.name}", origin="command line")
    if "." in entry.name:
        chosen = Setting(value=entry.name, place=chosen.place, origin=chosen.origin)
    settings = {**needed, **invocation.settings, "lr_scheduler": chosen}
    resolution = Resolver(settings, invocation.host, registry).resolve()
    problems = list(resolution.problems)
    if resolution.config is not None:
        problems.extend(resolution.config.scheduler.check(resolution.config))
    if problems or resolution.config is None:
        raise UserError(problems)
    return resolution.config


def _draw(rates: Sequence[float], title: str) -> None:
    import plotext

    width, height = shutil.get_terminal_size((80, 24))
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(width, min(height - 1, 20))
    plotext.plot(list(range(1, len(rates) + 1)), list(rates), marker="braille")
    plotext.title(title)
    plotext.xlabel("optimizer step")
    low, high, last = min(rates), max(rates), len(rates)
    heights = [low + (high - low) * part / 4 for part in range(5)]
    steps = sorted({max(1, round(last * part / 4)) for part in range(5)})
    plotext.yticks(heights, [f"{height:.3g}" for height in heights])
    plotext.xticks(steps, [str(step) for step in steps])
    print(plotext.uncolorize(plotext.build()))


def _write(rates: Sequence[float], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(rates) + 1), rates)
    axes.set(title=title, xlabel="optimizer step", ylabel="learning rate")
    axes.grid(visible=True)
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError.of("--plot", f"{path} cannot be written: {error.strerror}") from error
