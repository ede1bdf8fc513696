"""What is recorded of a run: the metadata of its files, and ``NAME.run.json``.

The ``ss_*`` keys are sd-scripts' convention, which model managers and web UIs read; the values are
those the run really used. What the model, the network and the data say of themselves is theirs.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from sdxl_train._version import __version__
from sdxl_train.checkpoint import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sdxl_train.config import RunConfig
    from sdxl_train.counts import StepCounts

MINIMAL_KEYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
"""What ``--no_metadata`` keeps: clients need these to load a file."""

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The facts of a run that do not change while it trains.

    Attributes:
        seed: The seed in use, drawn if the user gave none.
        session: Random number that tells two runs apart.
        started: Unix time.
        described: Metadata from the model, the network and the data.
    """

    config: RunConfig
    counts: StepCounts
    seed: int
    session: int
    started: float
    described: Mapping[str, str]

    def metadata(self, *, step: int, epoch: int) -> dict[str, str]:
        """Give the header of a network saved at this point."""
        values = {
            **{name: str(value) for name, value in self._training().items()},
            **self.described,
            "ss_steps": str(step),
            "ss_epoch": str(epoch),
            "ss_training_finished_at": str(time.time()),
        }
        if self.config.output.no_metadata:
            values = {
                name: text
                for name, text in values.items()
                if name in MINIMAL_KEYS or name.startswith("modelspec.")
            }
        return {**values, **self._modelspec()}

    def _training(self) -> dict[str, Any]:
        """Give the options in use under sd-scripts' names; what a run lacks reads ``None``."""
        config, counts = self.config, self.counts
        used = {
            key.removeprefix("network_args."): item["value"]
            for key, item in config.options().items()
        }
        recorded = {f"ss_{name}": used.get(name) for name in _RECORDED_OPTIONS}
        return recorded | {
            "ss_session_id": self.session,
            "ss_training_started_at": self.started,
            "ss_output_name": config.output.output_name,
            "ss_seed": self.seed,
            "ss_num_batches_per_epoch": counts.batches_per_epoch,
            "ss_num_epochs": counts.epochs,
            "ss_max_train_steps": counts.total,
            "ss_lr_warmup_steps": counts.warmup,
            "ss_optimizer": config.name_of("optimizer"),
            "ss_network_module": config.name_of("network"),
            "ss_loss_type": config.name_of("loss"),
            "ss_lr_scheduler": config.name_of("scheduler"),
            "ss_training_comment": config.output.training_comment,
            "ss_sd_scripts_commit_hash": f"sdxl-train {__version__}",
        }

    def _modelspec(self) -> dict[str, str]:
        """Give the part of the Stability model specification that is not the model's to say."""
        name = self.config.output.output_name
        date = datetime.fromtimestamp(self.started, tz=UTC)
        return {
            "modelspec.title": name or f"LoRA@{int(self.started)}",
            "modelspec.date": date.replace(tzinfo=None).isoformat(timespec="seconds"),
            "modelspec.implementation_version": f"sdxl-train/{__version__}",
        }

    def write(self, path: Path, results: Mapping[str, Any]) -> None:
        """Write ``NAME.run.json``: options with origins, versions, seed and results."""
        document = {
            "schema_version": 1,
            "sdxl_train": __version__,
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in _PACKAGES},
            "plugins": [
                {
                    "name": plugin.name,
                    "distribution": plugin.distribution,
                    "version": plugin.version,
                }
                for plugin in self.config.plugins
            ],
            "options": self.config.options(),
            "seed": self.seed,
            "started_at": self.started,
            "steps": {
                "batches_per_epoch": self.counts.batches_per_epoch,
                "epochs": self.counts.epochs,
                "optimizer_steps": self.counts.total,
                "warmup_steps": self.counts.warmup,
            },
            "metadata": dict(self.described),
            "results": dict(results),
        }
        write_atomically(path, json.dumps(document, indent=2, ensure_ascii=False).encode())


_RECORDED_OPTIONS = (
    "learning_rate",
    "text_encoder_lr",
    "unet_lr",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "network_dim",
    "network_alpha",
    "network_dropout",
    "mixed_precision",
    "full_fp16",
    "clip_skip",
    "max_token_length",
    "cache_latents",
    "lowram",
    "noise_offset",
    "multires_noise_iterations",
    "multires_noise_discount",
    "adaptive_noise_scale",
    "zero_terminal_snr",
    "max_grad_norm",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
    "face_crop_aug_range",
    "prior_loss_weight",
    "min_snr_gamma",
    "scale_weight_norms",
    "ip_noise_gamma",
    "debiased_estimation",
    "noise_offset_random_strength",
    "ip_noise_gamma_random_strength",
    "huber_schedule",
    "huber_scale",
    "huber_c",
    "fp8_base",
    "fp8_base_unet",
    "validation_seed",
    "validation_split",
    "max_validation_steps",
    "validate_every_n_epochs",
    "validate_every_n_steps",
    "resize_interpolation",
)
"""Options that sd-scripts records, each as ``ss_`` and its name."""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
