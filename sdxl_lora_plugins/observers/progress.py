"""A progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, ClassVar, Never

from tqdm import tqdm

from sdxl_train import Field, Observer, peak_memory, shows_bars

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train import Run, StepResult

logger = logging.getLogger(__name__)


class Progress(Observer):
    """Progress: steps, loss, rate and time left."""

    always: ClassVar[bool] = True

    progress: bool = Field(True, description="Show progress while training.")

    def active(self) -> bool:
        """Tell whether progress is wanted."""
        return self.progress

    def build(self, run: Run) -> object:
        """Build the bar for this run."""
        return _ProgressBar(run)


class _ProgressBar:
    """Reads the loss only when it shows it: reading waits for the device."""

    _SECONDS_BETWEEN_BARS = 0.5
    _SECONDS_BETWEEN_LINES = 60.0
    _LINES = 10
    _RECENT = 20

    def __init__(self, run: Run) -> None:
        self.run = run
        self.total = run.counts.total
        self.device = next(iter(run.assembly.parameters)).device
        self._bar: tqdm[Never] | None = None
        self._shown_at = self._began = time.monotonic()

    def run_started(self) -> None:
        self._shown_at = self._began = time.monotonic()
        if shows_bars():
            self._bar = tqdm(
                total=self.total,
                initial=self.run.first_step,
                desc="steps",
                leave=True,
                bar_format="{desc} {percentage:.0f}% |{bar}| {n_fmt}/{total_fmt} "
                "[{elapsed}<{remaining}{postfix}]",
            )

    def step_finished(self, step: StepResult) -> None:
        now = time.monotonic()
        since, last = now - self._shown_at, step.step == self.total
        if self._bar is not None:
            self._bar.update()
            if since > self._SECONDS_BETWEEN_BARS or last:
                self._shown_at = now
                self._bar.set_postfix_str(", ".join(self._numbers()))
            return
        regular = step.step % max(1, self.total // self._LINES) == 0
        if regular or last or since > self._SECONDS_BETWEEN_LINES:
            self._shown_at = now
            done = step.step - self.run.first_step
            left = (self.total - step.step) * (now - self._began) / max(1, done)
            numbers = [*self._numbers(), f"{tqdm.format_interval(left)} left"]
            logger.info("step %d/%d, %s", step.step, self.total, ", ".join(numbers))

    def run_finished(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _numbers(self) -> Iterator[str]:
        """Yield what is worth seeing of the newest steps."""
        newest, history = self.run.history.newest(), self.run.history
        if newest is None:
            return
        recent = list(history.since(max(0, len(history) - self._RECENT)))
        seconds = sum(step.seconds for step in recent)
        yield f"loss {newest.loss:.4f} (mean {newest.average_loss:.4f})"
        yield f"lr {'/'.join(dict.fromkeys(f'{r:.3g}' for r in newest.learning_rates.values()))}"
        yield f"{seconds / len(recent):.3g} s/it"
        yield f"{sum(step.samples for step in recent) / max(seconds, 1e-9):.3g} img/s"
        if history.skipped:
            yield f"{history.skipped} skipped"
        peak = peak_memory(self.device)["peak_bytes"]
        if peak is not None:
            yield f"{peak / 1e9:.2f} GB"
