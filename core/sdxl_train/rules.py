"""Rules about a run's options that belong to no single component, and about what they lead to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sdxl_train.checkpoint import PICKLED_FORMATS
from sdxl_train.counts import DEFAULT_MAX_STEPS
from sdxl_train.earlier import files_of_earlier_run
from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.config import RunConfig
    from sdxl_train.data.sources import Scan

LONGEST_NAME = 200
"""Bytes of a run's name. File systems allow 255; steps, endings and temporary names come on top."""


def rule_problems(config: RunConfig, scanned: Scan | None) -> Iterator[Problem]:
    """Give what forbids a run.

    Args:
        config: Options that are valid by themselves.
        scanned: The images; None if there are none that could be found.
    """
    yield from _output_problems(config)
    yield from _precision_problems(config)
    yield from _fusion_problems(config)
    yield from _reuse_problems(config)
    yield from _merge_problems(config)
    if config.optimizer.own_schedule and not config.scheduler.default:
        yield Problem(
            place=config.place("lr_scheduler"),
            message=f"{config.name_of('optimizer')} schedules its rate itself",
            remedy="leave out --lr_scheduler",
        )
    if scanned is not None:
        yield from _without_validation(config, scanned)


def rule_remarks(config: RunConfig, scanned: Scan | None) -> Iterator[str]:
    """Say what a run does that its user may not expect; the arguments as above."""
    yield from _length_remarks(config)
    yield from _start_remarks(config)
    yield from _output_remarks(config)
    yield from _idle_options(config, scanned)
    yield from _rate_remarks(config)
    yield from _secret_remarks(config)
    if scanned is not None:
        yield from _idle_validation(config, scanned)
    yield from _cache_remarks(config, scanned)


def _output_problems(config: RunConfig) -> Iterator[Problem]:
    folder = config.output.output_dir
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        yield Problem(
            place=config.place("output_dir"),
            message=f"{existing} is a file, expected a folder",
            remedy="name another folder",
        )
    elif not os.access(existing, os.W_OK):
        yield Problem(
            place=config.place("output_dir"),
            message=f"{existing} cannot be written to",
            remedy="name another folder, or change its permissions",
        )
    name = config.output.output_name
    if name is not None and (not name or "/" in name or "\\" in name or not name.isprintable()):
        yield Problem(
            place=config.place("output_name"),
            message=f"{name!r} is not a file name",
            remedy="put the folder in --output_dir",
        )
    elif name is not None and len(name.encode()) > LONGEST_NAME:
        yield Problem(
            place=config.place("output_name"),
            message=f"has {len(name.encode())} bytes; the names of files made of it would be too "
            f"long",
            remedy=f"use at most {LONGEST_NAME} bytes",
        )


def _merge_problems(config: RunConfig) -> Iterator[Problem]:
    files = len(config.network.base_weights or [])
    multipliers = len(config.network.base_weights_multiplier or [])
    if multipliers > files:
        yield Problem(
            place=config.place("base_weights_multiplier"),
            message=f"{multipliers} multipliers for {files} files of base_weights",
            remedy="give one for each file, or fewer: missing ones are 1",
        )


def _precision_problems(config: RunConfig) -> Iterator[Problem]:
    training = config.training
    for name, needed in (("full_bf16", "bf16"), ("full_fp16", "fp16")):
        if getattr(training, name) and training.mixed_precision != needed:
            yield Problem(
                place=config.place(name),
                message=f"needs --mixed_precision {needed}, and "
                f"{config.place('mixed_precision')} is {training.mixed_precision}",
                remedy=f"set --mixed_precision {needed}, or leave {name} out",
            )
        if getattr(training, name) and config.optimizer.train_eval_modes:
            yield Problem(
                place=config.place(name),
                message=f"does not go with {config.place('optimizer_type')} "
                f"{config.name_of('optimizer')}, which swaps its weights outside of its steps",
                remedy="leave one of them out",
            )


def _fusion_problems(config: RunConfig) -> Iterator[Problem]:
    training = config.training
    if not training.fused_backward_pass:
        return
    accumulated = training.gradient_accumulation_steps
    hindrances = {
        f"{config.place('optimizer_type')} {config.name_of('optimizer')}, which cannot step "
        "parameters one by one": not config.optimizer.fused_backward,
        f"{config.place('gradient_accumulation_steps')} {accumulated}: gradients that are freed "
        "at once cannot add up": accumulated > 1,
        f"{config.place('mixed_precision')} fp16, whose gradients are scaled until all are "
        "there": training.mixed_precision == "fp16",
    }
    for hindrance, is_there in hindrances.items():
        if is_there:
            yield Problem(
                place=config.place("fused_backward_pass"),
                message=f"does not go with {hindrance}",
                remedy="leave one of them out; docs/optimizers.md names the optimizers that can",
            )


def _reuse_problems(config: RunConfig) -> Iterator[Problem]:
    """Refuse what needs gradients or weights to stay where they are, where memory is reused."""
    training = config.training
    if not config.model.reuses_memory:
        return
    hindrances = {
        "gradient_accumulation_steps": (
            training.gradient_accumulation_steps > 1,
            "the next batch would be written over the gradients that are to add up",
        ),
        "full_bf16": (training.full_bf16, _MOVED),
        "full_fp16": (training.full_fp16, _MOVED),
    }
    for name, (is_there, reason) in hindrances.items():
        if is_there:
            yield Problem(
                place=config.place(name),
                message=f"does not go with CUDA graphs, which {config.place('dynamo_mode')} asks "
                f"for: {reason}",
                remedy="leave one of them out",
            )


_MOVED = "they know weights by their place in memory, and each step rounds them into another"


def _cache_remarks(config: RunConfig, scanned: Scan | None) -> Iterator[str]:
    """Say what becomes of caches, where it may not be expected."""
    data = config.dataset
    if data.skip_cache_check and not (
        data.cache_latents_to_disk or data.cache_text_encoder_outputs_to_disk
    ):
        yield f"{config.place('skip_cache_check')} has no effect: nothing is cached on disk"
    foreign = [s.path for s in scanned.skipped if s.path.suffix == ".npz"] if scanned else []
    if foreign and data.caches_latents:
        yield (
            f"{len(foreign)} .npz files of another trainer, such as {foreign[0]}, are left alone: "
            "`sdxl-train cache --import_npz` takes over what it can verify"
        )


def _length_remarks(config: RunConfig) -> Iterator[str]:
    training = config.training
    if training.max_train_epochs is not None and training.max_train_steps is not None:
        yield (
            f"{config.place('max_train_steps')} has no effect: "
            f"{config.place('max_train_epochs')} takes precedence"
        )
    if training.max_train_epochs is None and training.max_train_steps is None:
        yield (
            f"neither --max_train_steps nor --max_train_epochs is set: training for "
            f"{DEFAULT_MAX_STEPS} steps, sd-scripts' default"
        )


def _start_remarks(config: RunConfig) -> Iterator[str]:
    """Say where a run begins that does not begin at its beginning."""
    training = config.training
    if training.initial_step is not None and training.initial_epoch is not None:
        yield (
            f"{config.place('initial_epoch')} has no effect: "
            f"{config.place('initial_step')} takes precedence"
        )
    begins = training.initial_step is not None or training.initial_epoch is not None
    if begins and training.resume is None:
        yield (
            f"{config.place('initial_step' if training.initial_step else 'initial_epoch')} skips "
            f"steps but restores nothing: weights and learning rate start fresh without --resume"
        )
    elif begins:
        yield "the step count of the state is ignored: --initial_step or --initial_epoch is set"
    if training.skip_until_initial_step and not begins and training.resume is None:
        yield "--skip_until_initial_step has no effect: there is no --initial_step or --resume"
    for name in ("reset_optimizer", "allow_base_change", "drop_plugin_state"):
        if getattr(training, name) and training.resume is None:
            yield f"{config.place(name)} has no effect without --resume"


def _output_remarks(config: RunConfig) -> Iterator[str]:
    """Say what becomes of files that are there, and what files cannot hold."""
    output = config.output
    earlier = files_of_earlier_run(output) if config.training.resume is None else []
    if earlier:
        fate = "are removed" if output.overwrite else "are moved into a folder of their own"
        yield (
            f"{output.output_dir} has {len(earlier)} files of an earlier run of this name, "
            f"such as {earlier[0].name}: they {fate} when training starts"
            + ("; to go on with it, use --resume latest" if not output.overwrite else "")
        )
    if output.save_model_as in PICKLED_FORMATS:
        for name in config.metadata.given():
            yield (
                f"{config.place(name)} has no effect: {output.save_model_as} files have no metadata"
            )


def _rate_remarks(config: RunConfig) -> Iterator[str]:
    training = config.training
    if training.fused_backward_pass and training.max_grad_norm:
        yield (
            f"{config.place('max_grad_norm')} is {training.max_grad_norm:g}: with "
            f"--fused_backward_pass it limits each gradient by itself; 0 = off"
        )
    finds_rates = config.optimizer.single_lr or config.optimizer.brings_schedule()
    if not config.is_set("learning_rate") and not finds_rates:
        yield (
            f"--learning_rate is not set: sd-scripts' default of "
            f"{config.optimizer.learning_rate:g} is low for a network; 1e-4 is usual"
        )


def _secret_remarks(config: RunConfig) -> Iterator[str]:
    for name in sorted(config.secrets()):
        if (setting := config.settings.get(name)) and setting.origin == "command line":
            yield (
                f"{config.place(name)}: a secret on a command line stays in the shell's history, "
                f"and others on this machine may see it; the environment is a better place"
            )


def _uses_cuda(config: RunConfig, asked: str) -> bool:
    """Tell whether the run would compute there; looks only if option ``asked`` is set."""
    return config.is_set(asked) and config.device().type == "cuda"


def _idle_options(config: RunConfig, scanned: Scan | None) -> Iterator[str]:
    """Name options that do nothing without another one, which sd-scripts passes over in silence."""
    output, dataset = config.output, config.dataset
    saves_states = output.save_state or output.save_state_on_train_end
    by_epoch = output.save_every_n_epochs or output.save_n_epoch_ratio
    conditions: tuple[tuple[str, object, str], ...] = (
        ("save_last_n_epochs", by_epoch, "save_every_n_epochs"),
        ("save_last_n_steps", output.save_every_n_steps, "save_every_n_steps"),
        (
            "save_last_n_epochs_state",
            saves_states or output.save_state_every_n_epochs,
            "save_state",
        ),
        ("save_last_n_steps_state", saves_states or output.save_state_every_n_steps, "save_state"),
        (
            "persistent_data_loader_workers",
            dataset.max_data_loader_n_workers and not dataset.caches_latents,
            "workers that load images while it trains (max_data_loader_n_workers above 0, "
            "latents not cached)",
        ),
        *((name, _uses_cuda(config, name), "a CUDA GPU") for name in ("check_late", "pin_memory")),
        ("prior_loss_weight", _has_regularization(scanned), "regularization images"),
    )
    for name, needed, what in conditions:
        if config.is_set(name) and not needed:
            yield f"{config.place(name)} has no effect without {what}"


def _without_validation(config: RunConfig, scanned: Scan) -> Iterator[Problem]:
    """Refuse what goes by the loss on held-out images where it is never measured."""
    training = config.training
    measured = training.validate_every_n_epochs != 0 or training.validate_every_n_steps
    asked = {
        "early_stop_patience": training.early_stop_patience is not None,
        "save_best": config.output.save_best,
    }
    for name in (name for name, is_asked in asked.items() if is_asked):
        if not scanned.validation:
            yield Problem(
                place=config.place(name),
                message="goes by the loss on held-out images, and none are held out",
                remedy="add --validation_split 0.1",
            )
        elif not measured:
            yield Problem(
                place=config.place(name),
                message="goes by the loss on held-out images, and it is never measured",
                remedy="leave out --validate_every_n_epochs 0, or add --validate_every_n_steps",
            )


def _idle_validation(config: RunConfig, scanned: Scan) -> Iterator[str]:
    training = config.training
    if not scanned.validation:
        names = ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")
        for name in names:
            if config.is_set(name):
                yield f"{config.place(name)} has no effect: no images are held out to validate on"
    elif training.validate_every_n_epochs == 0 and not training.validate_every_n_steps:
        yield (
            f"{config.place('validate_every_n_epochs')}: images are held out of training, and "
            f"nothing is measured on them"
        )


def _has_regularization(scanned: Scan | None) -> bool:
    """Tell whether there are regularization images, or may be."""
    if scanned is None:
        return True
    return any(subset.is_reg for data in scanned.datasets for subset in data.config.subsets)
