"""What each step of a run gave, read from the device once in a while, for all who want numbers.

Progress, trackers, the report and ``NAME.run.json`` show the same numbers. Each of them asking the
device for itself, after each step, would make it wait each time; so steps are collected unread,
and :data:`READ_EVERY` of them come over in one transfer.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from sdxl_train.loop import StepResult

READ_EVERY = 10
"""Steps that are read together."""
NUM_BINS = 10
"""Parts of the timesteps among which losses are told apart."""


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """A step as numbers.

    Attributes:
        step: Optimizer steps done, this one included.
        epoch: The epoch it belongs to, from 1.
        loss: Mean loss of its samples.
        average_loss: Mean of the losses of the last steps, as many as an epoch has.
        grad_norm: Norm of all gradients before clipping.
        seconds: How long it took, without what observers, saves and validation took after it.
        samples: How many there were in it.
        learning_rates: The rate of each optimizer group, by name.
        metrics: What else there is to log, by name.
    """

    step: int
    epoch: int
    loss: float
    average_loss: float
    grad_norm: float
    seconds: float
    samples: int
    learning_rates: Mapping[str, float]
    metrics: Mapping[str, float]


class History:
    """The steps of a run, those of the run that it goes on from included.

    Args:
        images: Names of the images that are trained.
        num_timesteps: Timesteps of the noise schedule.
        steps_per_epoch: How many losses make an average.

    Attributes:
        skipped: How many of the steps the gradient scaler left without effect.
    """

    def __init__(
        self, images: Iterable[str] = (), *, num_timesteps: int = 1000, steps_per_epoch: int = 1
    ) -> None:
        self.num_timesteps = num_timesteps
        self.skipped = 0
        self._columns: dict[str, array[float]] = {}
        self._length = 0
        self._window: deque[float] = deque(maxlen=steps_per_epoch)
        self._unread: list[tuple[StepResult, float]] = []
        self._rows = {name: row for row, name in enumerate(dict.fromkeys(images))}
        self._sums: NDArray[np.float64] = np.zeros((len(self._rows), NUM_BINS))
        self._counts: NDArray[np.float64] = np.zeros((len(self._rows), NUM_BINS))

    def __len__(self) -> int:
        """Give the number of steps that are read."""
        return self._length

    def add(self, step: StepResult, seconds: float) -> None:
        """Take a step that took ``seconds``; it is read with those around it."""
        self.skipped += step.skipped
        self._unread.append((step, seconds))
        if len(self._unread) >= READ_EVERY:
            self.read()

    def read(self) -> None:
        """Read what is not read yet. Waits for the device."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        tensors = [
            tensor
            for step, _ in unread
            for tensor in (
                step.loss,
                step.grad_norm,
                *step.metrics.values(),
                step.timesteps,
                step.sample_losses,
            )
        ]
        device = unread[0][0].loss.device
        flat = [tensor.detach().reshape(-1).to(device, torch.float32) for tensor in tensors]
        values = iter(torch.cat(flat).tolist())
        for step, seconds in unread:
            self._keep(step, seconds, values)

    def _keep(self, step: StepResult, seconds: float, values: Iterator[float]) -> None:
        loss, grad_norm = next(values), next(values)
        self._window.append(loss)
        row: dict[str, float] = {
            "step": step.step,
            "epoch": step.epoch,
            "loss": loss,
            "average_loss": math.fsum(self._window) / len(self._window),
            "grad_norm": grad_norm,
            "seconds": seconds,
            "samples": len(step.keys),
            **{f"lr {name}": rate for name, rate in step.learning_rates.items()},
            **{f"metric {name}": next(values) for name in step.metrics},
        }
        for name in row.keys() | self._columns.keys():
            if name not in self._columns:
                self._columns[name] = array("d", [math.nan]) * self._length
            self._columns[name].append(row.get(name, math.nan))
        self._length += 1
        timesteps = [next(values) for _ in step.keys]
        for key, timestep in zip(step.keys, timesteps, strict=True):
            sample_loss = next(values)
            if math.isfinite(sample_loss):  # else fp16 overflowed, and the step was skipped
                self._count(key, int(timestep), sample_loss)

    def _count(self, image: str, timestep: int, loss: float) -> None:
        if image not in self._rows:
            self._rows[image] = len(self._rows)
            self._sums = np.vstack([self._sums, np.zeros((1, NUM_BINS))])
            self._counts = np.vstack([self._counts, np.zeros((1, NUM_BINS))])
        row, part = self._rows[image], timestep * NUM_BINS // self.num_timesteps
        self._sums[row, part] += loss
        self._counts[row, part] += 1

    def since(self, index: int) -> Iterator[StepNumbers]:
        """Give the steps that are read, but for the first ``index`` of them."""
        for position in range(index, self._length):
            row = {
                name: column[position]
                for name, column in self._columns.items()
                if not math.isnan(column[position]) or name == "loss"
            }
            yield StepNumbers(
                step=int(row["step"]),
                epoch=int(row["epoch"]),
                loss=row["loss"],
                average_loss=row["average_loss"],
                grad_norm=row.get("grad_norm", math.nan),
                seconds=row["seconds"],
                samples=int(row["samples"]),
                learning_rates=_named(row, "lr "),
                metrics=_named(row, "metric "),
            )

    def newest(self) -> StepNumbers | None:
        """Give the newest step, reading it if need be; None before the first."""
        self.read()
        return next(self.since(self._length - 1)) if self._length else None

    def as_json(self) -> dict[str, Any]:
        """Give all steps as columns of plain JSON values; a value that is not finite is None."""
        columns = {name: _plain(column) for name, column in self._columns.items()}
        steps = {name: column for name, column in columns.items() if " " not in name}
        counts = {
            name: [int(value) for value in self._columns.get(name, ())]
            for name in ("step", "epoch", "samples")
        }
        return {
            **steps,
            **counts,
            "learning_rates": _named(columns, "lr "),
            "metrics": _named(columns, "metric "),
        }

    def loss_by_timestep(self) -> list[dict[str, Any]]:
        """Give the mean loss in each part of the timesteps; None where there was no sample."""
        sums, counts = self._sums.sum(axis=0), self._counts.sum(axis=0)
        edges = [-(-part * self.num_timesteps // NUM_BINS) for part in range(NUM_BINS + 1)]
        return [
            {
                "from": edges[part],
                "below": edges[part + 1],
                "samples": int(counts[part]),
                "loss": _short(sums[part] / counts[part]) if counts[part] else None,
            }
            for part in range(NUM_BINS)
        ]

    def loss_by_image(self) -> list[dict[str, Any]]:
        """Give the loss of each image, those with the highest relative loss first.

        ``loss`` is the mean over its samples. They had other timesteps than those of other images,
        and the loss depends on these more than on the image; ``relative_loss`` is its mean in
        units of the mean loss of all images in the same part of the timesteps.
        """
        seen = self._counts.sum(axis=0)
        means = np.divide(self._sums.sum(axis=0), seen, out=np.zeros(NUM_BINS), where=seen > 0)
        relative = np.divide(self._sums, means, out=np.zeros_like(self._sums), where=means > 0)
        counts = self._counts.sum(axis=1)
        images: list[dict[str, Any]] = [
            {
                "image": name,
                "samples": int(counts[row]),
                "loss": _short(self._sums[row].sum() / counts[row]),
                "relative_loss": _short(relative[row].sum() / counts[row]),
            }
            for name, row in self._rows.items()
            if counts[row]
        ]
        return sorted(images, key=lambda image: image["relative_loss"], reverse=True)

    def state_dict(self) -> dict[str, Any]:
        """Give what :meth:`load_state_dict` takes: tensors and plain values."""
        self.read()
        return {
            "skipped": self.skipped,
            # Not as tensors, whose values must be finite: a skipped step has a gradient of inf.
            "columns": {name: column.tolist() for name, column in self._columns.items()},
            "images": list(self._rows),
            "sums": torch.from_numpy(self._sums.copy()),
            "counts": torch.from_numpy(self._counts.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin with the steps of the run that this one goes on from."""
        self.skipped = state["skipped"]
        self._columns = {n: array("d", column) for n, column in state["columns"].items()}
        losses = self._columns.get("loss", array("d"))
        self._length = len(losses)
        self._window.extend(losses[-(self._window.maxlen or 1) :])
        self._rows = {name: row for row, name in enumerate(state["images"])}
        self._sums, self._counts = state["sums"].numpy().copy(), state["counts"].numpy().copy()


def _named(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }


def _plain(column: Iterable[float]) -> list[float | None]:
    return [_short(value) for value in column]


def _short(value: float) -> float | None:
    """Round to six digits, so that a file of many is half as long."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
