"""A progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, ClassVar, Never

from tqdm import tqdm

from sdxl_train import Field, Observer

if TYPE_CHECKING:
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
        return _ProgressBar(run.plan.steps["optimizer_steps"])


class _ProgressBar:
    """Reads the loss only when it shows it: reading waits for the device."""

    _SECONDS_BETWEEN_BARS = 0.5
    _LINES = 10

    def __init__(self, total: int) -> None:
        self.total = total
        self._bar: tqdm[Never] | None = None
        self._shown_at = 0.0

    def run_started(self) -> None:
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.total, desc="steps", unit="step", leave=True)

    def step_finished(self, step: StepResult) -> None:
        if self._bar is None:
            if step.step % max(1, self.total // self._LINES) == 0 or step.step == self.total:
                logger.info("step %d/%d, loss %.4f", step.step, self.total, step.loss.item())
            return
        self._bar.update()
        now = time.monotonic()
        if now - self._shown_at > self._SECONDS_BETWEEN_BARS or step.step == self.total:
            self._shown_at = now
            rate = next(iter(step.learning_rates.values()))
            estimated = (v for k, v in step.metrics.items() if k.startswith("lr/d*lr/"))
            found = "".join(f", d*lr {value.item():.3g}" for value in list(estimated)[:1])
            self._bar.set_postfix_str(f"loss {step.loss.item():.4f}, lr {rate:.3g}{found}")

    def run_finished(self) -> None:
        if self._bar is not None:
            self._bar.close()
