"""What is recorded of a run: the metadata of its files, and ``NAME.run.json``.

The ``ss_*`` keys are sd-scripts' convention, which model managers and web UIs read; the values are
those the run really used. What the model, the network and the data say of themselves is theirs.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from sdxl_train._version import __version__
from sdxl_train.data.metadata import dataset_metadata
from sdxl_train.document import SCHEMA_VERSION, command, software
from sdxl_train.resume import batch_sizes
from sdxl_train.rng import derive_seed

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from sdxl_train.built import Built
    from sdxl_train.config import RunConfig
    from sdxl_train.counts import StepCounts
    from sdxl_train.preflight import Prepared

MINIMAL_KEYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
"""What ``--no_metadata`` keeps: clients need these to load a file."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The facts of a run that do not change while it trains.

    Attributes:
        seed: The seed in use, drawn if the user gave none.
        session: Random number that tells two runs apart.
        started: Unix time.
        optimizer: The optimizer's class and arguments, as sd-scripts records it.
        num_timesteps: How many the model's noise schedule has.
        described: Metadata from the model, the network and the data.
    """

    config: RunConfig
    counts: StepCounts
    seed: int
    session: int
    started: float
    optimizer: str
    num_timesteps: int
    described: Mapping[str, str]

    def metadata(self, *, step: int, epoch: int) -> dict[str, str]:
        """Give the header of a network saved at this point."""
        values = {
            **{name: str(value) for name, value in self._training().items()},
            **self.described,
            **self._network_args(),
            "ss_steps": str(step),
            "ss_epoch": str(epoch),
            "ss_training_finished_at": str(time.time()),
        }
        if self.config.metadata.no_metadata:
            values = {
                name: text
                for name, text in values.items()
                if name in MINIMAL_KEYS or name.startswith("modelspec.")
            }
        values |= self._modelspec()
        # Names of files that are no UTF-8 hold lone surrogates, which no header can.
        return {n: text.encode(errors="backslashreplace").decode() for n, text in values.items()}

    def _training(self) -> dict[str, Any]:
        """Give the options in use under sd-scripts' names; what a run lacks reads ``None``."""
        config, counts = self.config, self.counts
        used = {name: item["value"] for name, item in config.options().items()}
        schedule = config.optimizer.brings_schedule()
        if schedule is not None:
            used |= dict.fromkeys(_RATES)
        recorded = {f"ss_{name}": used.get(name, idle) for name, idle in RECORDED_OPTIONS.items()}
        return recorded | {
            "ss_session_id": self.session,
            "ss_training_started_at": self.started,
            "ss_output_name": config.output.output_name,
            "ss_seed": self.seed,
            "ss_num_batches_per_epoch": counts.batches_per_epoch,
            "ss_num_epochs": counts.epochs,
            "ss_max_train_steps": counts.total,
            "ss_lr_warmup_steps": counts.warmup,
            "ss_optimizer": self.optimizer,
            "ss_network_module": config.name_of("network"),
            "ss_debiased_estimation": used.get("debiased_estimation_loss", False),
            "ss_loss_type": config.name_of("loss"),
            "ss_lr_scheduler": schedule or config.name_of("scheduler"),
            "ss_training_comment": config.metadata.training_comment,
            "ss_sd_scripts_commit_hash": f"sdxl-train {__version__}",
        }

    def _network_args(self) -> dict[str, str]:
        """Give the arguments of the network as JSON, as sd-scripts does.

        What the network says of itself, the words of ``--network_args``, and the dropout, which has
        a flag of its own.
        """
        given = {
            name.removeprefix("network_args."): _told(setting.value)
            for name, setting in self.config.settings.items()
            if name.startswith("network_args.")
        }
        args = json.loads(self.described.get("ss_network_args", "{}")) | given
        if not args:
            return {}
        dropout = {"dropout": self.config.network.network_dropout}
        return {"ss_network_args": json.dumps(dropout | args)}

    def _modelspec(self) -> dict[str, str]:
        """Give the part of the Stability model specification that is not the model's to say."""
        config = self.config
        name = config.output.output_name
        date = datetime.fromtimestamp(self.started, tz=UTC)
        entries = {
            "modelspec.title": name or f"LoRA@{int(self.started)}",
            "modelspec.date": date.replace(tzinfo=None).isoformat(timespec="seconds"),
            "modelspec.implementation_version": f"sdxl-train/{__version__}",
        }
        timesteps = config.timesteps
        if config.is_set("min_timestep") or config.is_set("max_timestep"):
            last = self.num_timesteps if timesteps.max_timestep is None else timesteps.max_timestep
            entries["modelspec.timestep_range"] = f"{timesteps.min_timestep},{last}"
        return entries | config.metadata.modelspec()

    def facts(self) -> dict[str, Any]:
        """Give what ``NAME.run.json`` says of the run whatever becomes of it."""
        return {
            "schema_version": SCHEMA_VERSION,
            **software(),
            "plugins": [
                {
                    "name": plugin.name,
                    "distribution": plugin.distribution,
                    "version": plugin.version,
                }
                for plugin in self.config.plugins
            ],
            "command": command(self.config, self.seed),
            "options": self.config.options(),
            "seed": self.seed,
            "session": self.session,
            "started_at": self.started,
            "steps": {
                "batches_per_epoch": self.counts.batches_per_epoch,
                "epochs": self.counts.epochs,
                "optimizer_steps": self.counts.total,
                "warmup_steps": self.counts.warmup,
            },
            "metadata": dict(self.described),
        }


def make_record(prepared: Prepared, built: Built, *, main: bool) -> RunRecord:
    """Record what a run is, as it begins.

    Args:
        prepared: The run.
        built: What it trains with.
        main: Whether this process writes files; the others need not describe what goes into them.
    """
    config, model = prepared.config, built.model
    return RunRecord(
        config=config,
        counts=prepared.counts,
        seed=prepared.seed,
        session=derive_seed(time.time_ns(), "session") % 2**32,
        started=time.time(),
        optimizer=describe_optimizer(built.update.bare, config),
        num_timesteps=model.schedule.num_timesteps,
        described=_described(prepared, built) if main else {},
    )


def _described(prepared: Prepared, built: Built) -> dict[str, str]:
    config, scan = prepared.config, prepared.scan
    samples = max(batch_sizes(scan)) * prepared.processes  # of a batch, at most
    return {
        "ss_total_batch_size": str(samples * config.training.gradient_accumulation_steps),
        "modelspec.resolution": "{}x{}".format(*scan.largest_resolution),
        **dataset_metadata(scan, config.dataset),
        **built.model.metadata(),
        **built.assembly.adapter.metadata(),
    }


_RATES = ("learning_rate", "unet_lr", "text_encoder_lr")
RECORDED_OPTIONS: dict[str, object] = {
    "learning_rate": None,
    "text_encoder_lr": None,
    "unet_lr": None,
    "gradient_checkpointing": False,
    "gradient_accumulation_steps": None,
    "network_dim": None,
    "network_alpha": None,
    "network_dropout": None,
    "mixed_precision": None,
    "full_fp16": False,
    "clip_skip": None,
    "max_token_length": None,
    "cache_latents": False,
    "lowram": False,
    "noise_offset": None,
    "multires_noise_iterations": None,
    "multires_noise_discount": 0.3,
    "adaptive_noise_scale": None,
    "max_grad_norm": None,
    "caption_dropout_rate": None,
    "caption_dropout_every_n_epochs": None,
    "caption_tag_dropout_rate": None,
    "face_crop_aug_range": None,
    "prior_loss_weight": None,
    "min_snr_gamma": None,
    "scale_weight_norms": None,
    "ip_noise_gamma": None,
    "noise_offset_random_strength": False,
    "ip_noise_gamma_random_strength": False,
    "huber_schedule": "snr",
    "huber_scale": 1.0,
    "huber_c": 0.1,
    "fp8_base": False,
    "fp8_base_unet": False,
    "validation_seed": None,
    "validation_split": None,
    "max_validation_steps": None,
    "validate_every_n_epochs": None,
    "validate_every_n_steps": None,
    "resize_interpolation": None,
}
"""Options that sd-scripts records as ``ss_`` and their name, with what a run without them reads."""


def describe_optimizer(optimizer: torch.optim.Optimizer, config: RunConfig) -> str:
    """Name an optimizer as sd-scripts does: ``module.Class(weight_decay=0.1)``."""
    given = [
        f"{name.removeprefix('optimizer_args.')}={_told(setting.value)}"
        for name, setting in config.settings.items()
        if name.startswith("optimizer_args.")
    ]
    kind = type(optimizer)
    arguments = f"({','.join(given)})" if given else ""
    return f"{kind.__module__}.{kind.__qualname__}{arguments}"


def _told(value: object) -> str:
    """Give a value as text; of a path only its last part, for files are given to others."""
    text = str(value)
    path = PureWindowsPath(text)
    is_path = isinstance(value, PurePath) or path.drive or text.startswith(("/", "~", "./", "../"))
    return path.name if is_path else text
