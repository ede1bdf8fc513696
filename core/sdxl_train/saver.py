"""What a run writes as it goes: networks, states, and which of the older ones stay."""

from __future__ import annotations

import logging
import shutil
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sdxl_train.assembly import SAVED_DTYPES, saved_precision
from sdxl_train.checkpoint import (
    FOLDER_FORMATS,
    Checkpoint,
    average_path,
    file_name,
    prune,
    save_network,
    state_name,
)
from sdxl_train.disk import require_room
from sdxl_train.resume import batch_sizes, dataset_digest, model_identity, shaping_options
from sdxl_train.state import Manifest, load_optimizer, load_parameters, save_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from torch import Tensor

    from sdxl_train.built import Built
    from sdxl_train.counts import SavePoint
    from sdxl_train.preflight import Prepared
    from sdxl_train.record import RunRecord
    from sdxl_train.resume import ResumePoint

logger = logging.getLogger(__name__)


class Saver:
    """Writes networks and states, and puts a state back.

    Args:
        prepared: The run.
        built: What it trains with.
        record: Gives the metadata of networks.
        watched: Gives what a state holds beside, of what was seen so far.
        average: Gives the average of the weights after a step, if one is kept.

    Attributes:
        files: The networks that this run wrote and that are still there, the newest last; before
            all others the best one.
        network_at: The step of the newest network that this run saved, but for the best one.
        state_at: The step of the newest state that this run saved.
    """

    def __init__(
        self,
        prepared: Prepared,
        built: Built,
        record: RunRecord,
        *,
        watched: Callable[[], Mapping[str, Mapping[str, Any]]],
        average: Callable[[int], Sequence[Tensor] | None],
    ) -> None:
        self.prepared = prepared
        self.output = prepared.config.output
        self.assembly = built.assembly
        self.record = record
        self.evaluation = built.evaluation
        self.update = built.update
        self.optimizer = built.update.bare
        self.scheduler = built.scheduler
        self.scaler = built.accelerator.scaler
        self.watched = watched
        self.average = average
        self.files: list[Path] = []
        self.network_at: int | None = None
        self.state_at: int | None = None
        self._dataset = dataset_digest(prepared.scan)

    def save(self, point: SavePoint, step: int, epoch: int) -> Checkpoint | None:
        """Write what falls due, the state beside the network; give the network, if any.

        Raises:
            TrainingError: If a value is not finite or a file cannot be written; older ones are
                whole.
        """
        folder = self.output.output_dir
        checkpoint = None
        if point.network:
            checkpoint = self._save_network(point, step, epoch)
        if point.state:
            self._save_state(folder / state_name(self.output, point), step)
        for old in prune(self.output, point):
            for gone in (old, average_path(self.output, old)):
                self.files = [file for file in self.files if file != gone]
                if gone.is_dir():
                    shutil.rmtree(gone)
                else:
                    gone.unlink(missing_ok=True)
        return checkpoint

    def _save_network(self, point: SavePoint, step: int, epoch: int) -> Checkpoint:
        path = self.output.output_dir / file_name(self.output, point)
        metadata = self.record.metadata(step=step, epoch=epoch)
        written = [path]
        with self.evaluation.final_weights():
            self._write_network(path, metadata)
        average = self.average(step)
        if average is not None:
            written.insert(0, average_path(self.output, path))
            with self._at(average):
                self._write_network(written[0], metadata)
        others = [file for file in self.files if file not in written]
        if point.kind == "best":
            self.files = [*written, *others]
        else:
            self.files = [*others, *written]
            self.network_at = step
        return Checkpoint(path=path, kind=point.kind, step=step, epoch=epoch)

    def _write_network(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the network with the weights that it has now."""
        dtype = SAVED_DTYPES[saved_precision(self.prepared.config)]
        save_as = self.output.save_model_as
        tensors, told = self.assembly.adapter.state_dict(), dict(metadata)
        if save_as in FOLDER_FORMATS:
            tensors, more = self.assembly.model.diffusers_network(tensors)
            told |= more
        needed = sum(tensor.numel() * dtype.itemsize for tensor in tensors.values())
        require_room(path.parent, needed, path.name)
        save_network(path, tensors, told, dtype=dtype, save_as=save_as)
        logger.info("saved %s", path)

    @contextmanager
    def _at(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Let the network have other weights, and its own again bit for bit."""
        parameters = self.assembly.parameters
        kept = [parameter.data for parameter in parameters]
        try:
            for parameter, value in zip(parameters, weights, strict=True):
                parameter.data = value
            yield
        finally:
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data = value

    def restore(self, point: ResumePoint) -> None:
        """Put weights, optimizer and schedule back as they were.

        Raises:
            UserError: If the state does not fit.
        """
        load_parameters(point.folder, self.assembly.parameters)
        if self.prepared.config.training.reset_optimizer:
            rates = [group["lr"] for group in self.optimizer.param_groups]
            self._replay_schedule(point.manifest.step, rates)
            logger.info("weights taken from %s; the optimizer starts afresh", point.folder)
            return
        same_length = point.manifest.total == self.prepared.counts.total
        rates = [group["lr"] for group in self.optimizer.param_groups]
        load_optimizer(
            point.folder,
            optimizer=self.optimizer,
            scheduler=self.scheduler if same_length else None,
            scaler=self.scaler,
        )
        if not same_length:
            self._replay_schedule(point.manifest.step, rates)
        logger.info("resumed from %s at step %d", point.folder, point.manifest.step)

    def _replay_schedule(self, steps: int, rates: list[float]) -> None:
        """Bring the schedule of a run of another length to where it would be after ``steps``."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        with warnings.catch_warnings():
            # torch warns of a schedule that steps before its optimizer, which here did long ago.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(steps):
                self.scheduler.step()

    def _save_state(self, folder: Path, step: int) -> None:
        config, prepared = self.prepared.config, self.prepared
        watched = self.watched()
        manifest = Manifest(
            step=step,
            total=prepared.counts.total,
            seed=prepared.seed,
            options=shaping_options(config),
            dataset=self._dataset,
            model=model_identity(self.record.described),
            plugins={plugin.name: plugin.version for plugin in config.plugins},
            observers=tuple(watched["observers"]),
            batch_sizes=batch_sizes(prepared.scan),
            processes=prepared.processes,
        )
        save_state(
            folder,
            manifest,
            parameters=self.assembly.parameters,
            optimizer=self.update.state_dict(),
            scheduler=self.scheduler,
            scaler=self.scaler,
            observers=watched,
        )
        self.state_at = step
        logger.info("saved %s", folder)
