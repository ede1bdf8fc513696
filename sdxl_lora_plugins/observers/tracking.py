"""Log a run to trackers, under sd-scripts' keys, so that dashboards made for it go on working."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from accelerate.tracking import TensorBoardTracker, WandBTracker
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from sdxl_lora_plugins.observers.trackers import TrackerName, Trackers
    from sdxl_train import Run, SampledImage, StepNumbers, ValidationResult


class Sink(Protocol):
    """A tracker that runs."""

    def scalars(self, values: Mapping[str, float], *, axis: int, step: int, epoch: int) -> None:
        """Log numbers of a step; ``axis`` is what they are drawn over: the step or the epoch."""

    def pictures(self, images: Sequence[SampledImage]) -> None:
        """Log the pictures that were taken after a step, those that there are."""

    def options(self, values: dict[str, Any]) -> None:
        """Log the options of the run."""

    def finish(self) -> None:
        """Write what is not written yet, and end."""


class Tracking:
    """Logs one run to the trackers that its options name.

    Numbers are logged as the run's history reads them: some steps together.
    """

    def __init__(self, options: Trackers, run: Run) -> None:
        self.options = options
        self.run = run
        self.sinks: list[Sink] = []
        # What a resumed run had before, it has logged before.
        self._logged = len(run.history)

    def run_started(self) -> None:
        """Start the trackers."""
        stamp = f"{self.options.log_prefix}{time.strftime('%Y%m%d%H%M%S')}"
        root = self.options.logging_dir
        folder = root / stamp if root else self.run.output_dir
        settings = self.options.settings()
        for name in self.options.trackers:
            self.sinks.append(_SINKS[name](self.options, folder, settings.get(name, {})))
        if self.options.log_config:
            for sink in self.sinks:
                sink.options(self.options.logged_options(self.run.config))

    def step_finished(self) -> None:
        """Log the steps that were read since."""
        self._log_steps()

    def validation_finished(self, result: ValidationResult) -> None:
        """Log the loss on the held-out images, under the names of what made it due."""
        newest = self.run.history.newest()
        self._log_steps()
        if newest is None:
            return
        divergence = result.loss - newest.average_loss
        at = {"step": result.step, "epoch": result.epoch}
        if "step" in result.due:
            values = {"step_average": result.loss, "step_divergence": divergence}
            self._log(_prefixed("loss/validation/", values), axis=result.step, **at)
        if "epoch" in result.due:
            values = {"epoch_average": result.loss, "epoch_divergence": divergence}
            self._log(_prefixed("loss/validation/", values), axis=result.epoch, **at)
        each = zip(result.timesteps, result.losses, strict=True)
        values = {f"timestep_{timestep}": loss for timestep, loss in each}
        self._log(_prefixed("loss/validation/", values), axis=result.step, **at)

    def images_sampled(self, images: Sequence[SampledImage]) -> None:
        """Log the pictures, behind the steps that they were taken after."""
        self.run.history.read()
        self._log_steps()
        for sink in self.sinks:
            sink.pictures(images)

    def run_finished(self) -> None:
        """Log what is left, and end the trackers."""
        self.run.history.read()
        self._log_steps()
        while self.sinks:
            self.sinks.pop().finish()

    def _log_steps(self) -> None:
        for numbers in self.run.history.since(self._logged):
            self._logged += 1
            at = {"step": numbers.step, "epoch": numbers.epoch}
            self._log(_values(numbers), axis=numbers.step, **at)
            epoch = self.run.counts.epoch_ended_by(numbers.step)
            if epoch is not None:
                self._log({"loss/epoch_average": numbers.average_loss}, axis=epoch, **at)

    def _log(self, values: Mapping[str, float], *, axis: int, step: int, epoch: int) -> None:
        for sink in self.sinks:
            sink.scalars(values, axis=axis, step=step, epoch=epoch)


def _values(numbers: StepNumbers) -> dict[str, float]:
    return {
        "loss/current": numbers.loss,
        "loss/average": numbers.average_loss,
        **_prefixed("lr/", numbers.learning_rates),
        **numbers.metrics,
    }


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in values.items()}


class _TensorBoard:
    """Writes event files that TensorBoard shows."""

    def __init__(self, options: Trackers, folder: Path, settings: Mapping[str, Any]) -> None:
        self.tracker = TensorBoardTracker(options.log_tracker_name, folder, **settings)
        self.tracker.start()

    def scalars(self, values: Mapping[str, float], *, axis: int, step: int, epoch: int) -> None:
        self.tracker.log(dict(values), step=axis)

    def pictures(self, images: Sequence[SampledImage]) -> None:
        for image in images:
            if image.path is not None:
                pixels = {f"sample_{image.index}": _pixels(image.path)[np.newaxis]}
                self.tracker.log_images(pixels, step=image.step, dataformats="NHWC")

    def options(self, values: dict[str, Any]) -> None:
        self.tracker.store_init_configuration(values)

    def finish(self) -> None:
        self.tracker.finish()


class _WeightsAndBiases:
    """Logs to Weights & Biases, or to its files on disk with ``WANDB_MODE=offline``.

    Its own step can only grow, while epochs are another axis, so steps and epochs go along as
    values, as sd-scripts has it.
    """

    def __init__(self, options: Trackers, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        given: dict[str, Any] = {"dir": str(folder), **settings}
        if options.wandb_run_name is not None:
            given["name"] = options.wandb_run_name
        if options.wandb_api_key is not None:
            # Not wandb.login, which would write the key into the user's .netrc.
            given["settings"] = wandb.Settings(api_key=options.wandb_api_key.get_secret_value())
        self.tracker = WandBTracker(options.log_tracker_name, **given)
        self.tracker.start()
        for axis in ("global_step", "epoch"):
            self.tracker.tracker.define_metric(axis, hidden=True)

    def scalars(self, values: Mapping[str, float], *, axis: int, step: int, epoch: int) -> None:
        self.tracker.log({**values, "global_step": step, "epoch": epoch})

    def pictures(self, images: Sequence[SampledImage]) -> None:
        import wandb

        logged = {
            f"sample_{image.index}": wandb.Image(_pixels(image.path), caption=image.request.prompt)
            for image in images
            if image.path is not None
        }
        if logged:
            first = images[0]
            self.tracker.log({**logged, "global_step": first.step, "epoch": first.epoch})

    def options(self, values: dict[str, Any]) -> None:
        self.tracker.tracker.config.update(values, allow_val_change=True)

    def finish(self) -> None:
        self.tracker.finish()


_SINKS: dict[TrackerName, Callable[[Trackers, Path, Mapping[str, Any]], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
}


def _pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read a picture: uint8 [height, width, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
