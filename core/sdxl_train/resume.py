"""Whether and from where a run goes on: the state, compared with what the run asks for now."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_train.errors import Problem, UserError
from sdxl_train.metadata_options import MetadataOptions
from sdxl_train.options import options_of
from sdxl_train.process_options import ProcessOptions
from sdxl_train.state import (
    FILES,
    MANIFEST,
    WEIGHT_FILES,
    Manifest,
    complete_states,
    read_manifest,
    run_name,
    states_nearby,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sdxl_train.config import RunConfig
    from sdxl_train.data.sources import Scan

LATEST = "latest"

MAY_CHANGE = frozenset(
    {
        # Where things lie; what they hold is compared by digest.
        "train_data_dir",
        "reg_data_dir",
        "dataset_config",
        "in_json",
        "config_file",
        "output_config",
        "output_dir",
        "output_name",
        "plugin",
        "console_log_level",
        "console_log_file",
        "console_log_simple",
        "resume",
        # How long, and what is written and shown on the way.
        "max_train_steps",
        "max_train_epochs",
        "save_model_as",
        "save_precision",
        "save_every_n_epochs",
        "save_every_n_steps",
        "save_n_epoch_ratio",
        "save_last_n_epochs",
        "save_last_n_steps",
        "save_state",
        "save_state_on_train_end",
        "save_last_n_epochs_state",
        "save_last_n_steps_state",
        "save_state_every_n_epochs",
        "save_state_every_n_steps",
        "overwrite",
        # What is refused before the start, and what only tells of the data.
        "strict_captions",
        "debug_dataset",
        "cache_info",
        *MetadataOptions.model_fields,
        "strict_observers",
        "observer_timeout",
        "validate_every_n_steps",
        "validate_every_n_epochs",
        "max_validation_steps",
        "early_stop_patience",
        "save_best",
        "observer",
        # Where a run begins and on what; refused or told where it matters.
        "initial_step",
        "initial_epoch",
        "skip_until_initial_step",
        "reset_optimizer",
        "allow_base_change",
        "drop_plugin_state",
        "device",
        *ProcessOptions.model_fields,
        # How the same batches come about. (How many are encoded at once decides the last bits.)
        "on_bad_image",
        "cache_latents",
        "cache_latents_to_disk",
        "cache_text_encoder_outputs",
        "cache_text_encoder_outputs_to_disk",
        "skip_cache_check",
        "max_data_loader_n_workers",
        "persistent_data_loader_workers",
        "pin_memory",
        "check_late",
        # Compared apart: the seed of the state serves when the run names none, and twice the
        # processes with half the batch train the same.
        "seed",
        "train_batch_size",
    }
)
"""The framework's options that a resumed run may set otherwise; components name their own."""


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """A state to go on from."""

    folder: Path
    manifest: Manifest

    @property
    def record_path(self) -> Path:
        """Where the record of the run lies that saved it, if it still lies beside its states."""
        return self.folder.with_name(f"{run_name(self.folder)}.run.json")


def find_resume_point(config: RunConfig, *, whole: bool) -> ResumePoint | None:
    """Find the state that ``--resume`` names; None without that option.

    ``latest`` is the newest complete state of this run's name in its output folder; with none
    there yet, the run starts from the beginning, so that one command serves every start of a job.

    Args:
        config: The run's options.
        whole: Bring all of a state that lies elsewhere, or no more than its manifest.

    Raises:
        UserError: If there is no complete state under that name, or it cannot be had.
    """
    named = config.training.resume
    if named is None:
        return None
    needed: Sequence[str] = WEIGHT_FILES if config.training.reset_optimizer else FILES
    wanted = needed if whole else (MANIFEST,)
    brought = (observer.fetch_state(config, wanted) for observer in config.observers)
    folder = next((folder for folder in brought if folder is not None), None)
    if folder is not None:
        needed = wanted
    elif named == LATEST:
        output = config.output
        states = (
            complete_states(output.output_dir, output.output_name)
            if (output.output_dir.is_dir())
            else []
        )
        if not states:
            return None
        folder = states[-1][1]
    else:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            fault = "is a file, no state's folder" if folder.exists() else "does not exist"
            message = f"{folder} {fault}"
            raise UserError.of(config.place("resume"), message, states_nearby(folder))
    manifest = read_manifest(folder)
    for name in needed:
        if not (folder / name).is_file():
            raise UserError.of(
                str(folder), f"is no complete state: it has no {name}", states_nearby(folder)
            )
    return ResumePoint(folder=folder, manifest=manifest)


def differences(
    point: ResumePoint, config: RunConfig, scan: Scan, processes: int
) -> Iterator[Problem]:
    """Yield what the run asks for otherwise than the state and must not."""
    manifest = point.manifest
    sizes_before, sizes = list(manifest.batch_sizes), batch_sizes(scan)
    if sizes_before not in (sizes, [size * processes / manifest.processes for size in sizes]):
        yield Problem(
            place=config.place("train_batch_size"),
            message=f"{_sizes(sizes, processes)} now, "
            f"{_sizes(sizes_before, manifest.processes)} in {point.folder}",
            remedy="set it as it was, or start a new run without --resume",
        )
    before, now = manifest.options, shaping_options(config)
    # A state of an earlier version may hold what may change today.
    for name in sorted((before.keys() | now.keys()) - MAY_CHANGE):
        if before.get(name) != now.get(name):
            yield Problem(
                place=config.place(name),
                message=f"is {now.get(name)} now, {before.get(name)} in {point.folder}",
                remedy="set it as it was, or start a new run without --resume",
            )
    seed = config.training.seed
    if seed is not None and seed != point.manifest.seed:
        yield Problem(
            place=config.place("seed"),
            message=f"is {seed} now, {point.manifest.seed} in {point.folder}",
            remedy="leave it out: the seed of the state serves",
        )
    if dataset_digest(scan) != point.manifest.dataset:
        yield Problem(
            place=config.place("resume"),
            message=f"the images, captions or buckets are not those of {point.folder}",
            remedy="restore the dataset, or start a new run without --resume",
        )
    versions = {plugin.name: plugin.version for plugin in config.plugins}
    for name, version in point.manifest.plugins.items():
        if _major(versions.get(name)) != _major(version):
            yield Problem(
                place=config.place("plugin"),
                message=f"plugin '{name}' is {versions.get(name) or 'not in use'} now, {version} "
                f"in {point.folder}",
                remedy="install and name the version that saved the state",
            )
    yield from _absent_observers(point, config)


def _absent_observers(point: ResumePoint, config: RunConfig) -> Iterator[Problem]:
    """Yield which observers kept something in the state and do not take part now."""
    if config.training.drop_plugin_state:
        return
    present = {entry.qualified for entry in config.entries if entry.kind.name == "observer"}
    for name in point.manifest.observers:
        if name not in present:
            yield Problem(
                place=config.place("resume"),
                message=f"observer {name} kept something in {point.folder}, and is not in use now",
                remedy=f"add --observer {name}, or go on without it by --drop_plugin_state",
            )


def process_remark(point: ResumePoint, scan: Scan, processes: int) -> str | None:
    """Say that a run goes on with other batches, because it has another number of processes."""
    before, now = point.manifest, batch_sizes(scan)
    if processes == before.processes or list(before.batch_sizes) != now:
        return None
    return (
        f"{point.folder} is of a run with {_sizes(before.batch_sizes, before.processes)}; this one "
        f"has {_sizes(now, processes)}: it goes on with the same weights, but with other batches. "
        f"The product of both numbers is what should stay the same"
    )


def _sizes(sizes: Sequence[int], processes: int) -> str:
    """Word batch sizes: ``2 images for each of 2 processes``."""
    images = " and ".join(str(size) for size in dict.fromkeys(sizes))
    return f"batches of {images} for each of {processes} process{'es' if processes > 1 else ''}"


def batch_sizes(scan: Scan) -> list[int]:
    """Give the samples of a batch of each dataset, for each process."""
    return [dataset.config.batch_size for dataset in scan.datasets]


def shaping_options(config: RunConfig) -> dict[str, Any]:
    """Give the options that decide what is trained, as plain JSON values.

    Those of observers are not among them: an observer cannot change the weights.
    """
    watching = {name for observer in config.observers for name in type(observer).model_fields}
    own = {name for component in config.components for name in component.may_change}
    idle = MAY_CHANGE | watching | own
    found = {name: item["value"] for name, item in config.options().items() if name not in idle}
    for component in config.components:
        known = options_of(type(component))
        for name, text in component.contents().items():
            args = known[name].args
            found[f"{args}.{name}" if args else name] = text
    return found


def dataset_digest(scan: Scan) -> str:
    """Give a digest of what the data is, wherever it lies: names, sizes, captions, repeats."""
    digest = hashlib.blake2b(digest_size=16)
    for dataset in scan.datasets:
        subsets = [
            (
                subset.captions,
                subset.views,
                subset.resize_interpolation,
                subset.alpha_mask,
                subset.preserves_output,
            )
            for subset in dataset.config.subsets
        ]
        digest.update(repr(subsets).encode())
        for image in dataset.images:
            facts = (image.key, image.size, image.caption, image.repeats, image.is_reg, image.fit)
            digest.update(repr(facts).encode())
            if image.mask is not None:
                digest.update(image.mask.name.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def model_identity(metadata: Mapping[str, str]) -> str:
    """Identify a base model: by the hash of its file, else by its name, and what was merged."""
    keys = ("ss_new_sd_model_hash", "ss_new_vae_hash")
    hashes = [metadata[key] for key in keys if key in metadata]
    identity = hashes or [metadata.get("ss_sd_model_name", "")]
    merged = json.loads(metadata.get("ss_base_weights", "[]"))
    return " + ".join(
        [" ".join(identity), *(f"{item['multiplier']:g} * {item['sha256']}" for item in merged)]
    )


def _major(version: str | None) -> str | None:
    return version.partition(".")[0] if version else version
