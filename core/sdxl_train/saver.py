"""What a run writes as it goes: networks, states, and which of the older ones stay."""

from __future__ import annotations

import logging
import shutil
import warnings
from typing import TYPE_CHECKING

from sdxl_train.assembly import SAVED_DTYPES, saved_precision
from sdxl_train.checkpoint import (
    FOLDER_FORMATS,
    Checkpoint,
    file_name,
    prune,
    save_network,
    state_name,
)
from sdxl_train.disk import require_room
from sdxl_train.resume import dataset_digest, model_identity, shaping_options
from sdxl_train.state import Manifest, load_optimizer, load_parameters, save_state

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import Any

    import torch
    from torch.optim.lr_scheduler import LRScheduler

    from sdxl_train.assembly import Assembly
    from sdxl_train.counts import SavePoint
    from sdxl_train.evaluation import Evaluation
    from sdxl_train.preflight import Prepared
    from sdxl_train.record import RunRecord
    from sdxl_train.resume import ResumePoint

logger = logging.getLogger(__name__)


class Saver:
    """Writes networks and states, and puts a state back.

    Args:
        prepared: The run.
        assembly: What it trains.
        record: Gives the metadata of networks.
        evaluation: Gives the weights that the optimizer hands out.
        optimizer: The optimizer.
        scheduler: Its schedule.
        scaler: The gradient scaler, if there is one.
        watched: Gives what a state holds beside, of what was seen so far.

    Attributes:
        files: The networks that this run wrote and that are still there, the newest last; before
            all others the best one.
        network_at: The step of the newest network that this run saved, but for the best one.
        state_at: The step of the newest state that this run saved.
    """

    def __init__(
        self,
        prepared: Prepared,
        assembly: Assembly,
        record: RunRecord,
        evaluation: Evaluation,
        *,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        scaler: torch.amp.GradScaler | None,
        watched: Callable[[], Mapping[str, Mapping[str, Any]]],
    ) -> None:
        self.prepared = prepared
        self.output = prepared.config.output
        self.assembly = assembly
        self.record = record
        self.evaluation = evaluation
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        self.watched = watched
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
        for gone in prune(self.output, point):
            self.files = [file for file in self.files if file != gone]
            if gone.is_dir():
                shutil.rmtree(gone)
            else:
                gone.unlink()
        return checkpoint

    def _save_network(self, point: SavePoint, step: int, epoch: int) -> Checkpoint:
        path = self.output.output_dir / file_name(self.output, point)
        dtype = SAVED_DTYPES[saved_precision(self.prepared.config)]
        save_as = self.output.save_model_as
        with self.evaluation.final_weights():
            tensors = self.assembly.adapter.state_dict()
            metadata = self.record.metadata(step=step, epoch=epoch)
            if save_as in FOLDER_FORMATS:
                tensors, told = self.assembly.model.diffusers_network(tensors)
                metadata |= told
            needed = sum(tensor.numel() * dtype.itemsize for tensor in tensors.values())
            require_room(path.parent, needed, path.name)
            save_network(path, tensors, metadata, dtype=dtype, save_as=save_as)
        others = [file for file in self.files if file != path]
        if point.kind == "best":
            self.files = [path, *others]
        else:
            self.files = [*others, path]
            self.network_at = step
        logger.info("saved %s", path)
        return Checkpoint(path=path, kind=point.kind, step=step, epoch=epoch)

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
        manifest = Manifest(
            step=step,
            total=prepared.counts.total,
            seed=prepared.seed,
            options=shaping_options(config),
            dataset=self._dataset,
            model=model_identity(self.record.described),
            plugins={plugin.name: plugin.version for plugin in config.plugins},
        )
        save_state(
            folder,
            manifest,
            parameters=self.assembly.parameters,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            observers=self.watched(),
        )
        self.state_at = step
        logger.info("saved %s", folder)
