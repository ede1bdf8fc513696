"""Every check that needs no weights, all faults at once, before anything heavy is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdxl_train.components import Model
from sdxl_train.counts import SaveSchedule, StepCounts
from sdxl_train.data.batches import BatchPlan, count_batches
from sdxl_train.data.dataset_config import resolve_datasets
from sdxl_train.data.dataset_rules import warmup_remarks
from sdxl_train.data.scan_index import user_index
from sdxl_train.data.sources import scan
from sdxl_train.errors import Problem, UserError
from sdxl_train.launch import launched
from sdxl_train.machine import machine_problems
from sdxl_train.plugins import PluginHost
from sdxl_train.process_options import accelerate_settings
from sdxl_train.registry import Registry
from sdxl_train.resolve import Resolver
from sdxl_train.resume import ResumePoint, differences, find_resume_point, process_remark
from sdxl_train.rules import rule_problems, rule_remarks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sdxl_train.config import RunConfig
    from sdxl_train.data.sources import Scan
    from sdxl_train.options import Setting
    from sdxl_train.resolve import Resolution


@dataclass(kw_only=True)
class Prepared:
    """A run that passed every check, ready to be planned and built."""

    config: RunConfig
    host: PluginHost
    scan: Scan
    batches: BatchPlan
    validation: BatchPlan | None
    """The held-out images, if any; ``validation.epoch(1)`` gives the same batches each time."""
    counts: StepCounts
    seed: int
    processes: int = 1
    """How many train together; each has ``batch_size`` samples of a batch."""
    start: int = 0
    """Optimizer steps that count as done."""
    resume: ResumePoint | None = None
    warnings: list[str] = field(default_factory=list)
    given: Mapping[str, Setting] = field(default_factory=dict)
    """What was prepared."""

    @property
    def saves(self) -> SaveSchedule:
        """When the network is saved."""
        return SaveSchedule.of(self.config.output, self.counts)

    def with_options(self, changed: Mapping[str, Setting]) -> Prepared:
        """Prepare the same run with other values of some options, to plan it.

        Raises:
            UserError: If they do not go with the other options.
        """
        given = {**self.given, **changed}
        return prepare(given, self.host, start=False, processes=self.processes)


def prepare(
    settings: Mapping[str, Setting],
    host: PluginHost | None = None,
    *,
    start: bool = True,
    processes: int | None = None,
) -> Prepared:
    """Check everything that can be checked without weights.

    Args:
        settings: What the user gave.
        host: The plugins.
        start: The run is to start now, on this machine. So the machine must have what the run
            needs, and each image that never was is decoded: its head does not tell every damage.
            With ``on_bad_image`` as ``skip`` that is always done, for the plan depends on it.
        processes: How many train together. Default: as many as were launched.

    Raises:
        UserError: With every problem found.
    """
    settings = {**accelerate_settings(), **settings}
    host = host or PluginHost()
    processes = processes or launched().count
    resolution = Resolver(settings, host, Registry(host)).resolve()
    problems, warnings = list(resolution.problems), list(resolution.notices)
    scanned = _scan(resolution, problems, warnings, decode=start)
    config = resolution.config
    if config is not None:
        found, notes = _checked(config, scanned, processes, start=start)
        problems.extend(found)
        warnings.extend(notes)
    # Other processes go on from where the main one does; they may not even see its files.
    leads = launched().main
    resume = None
    if config and scanned and leads:
        resume = _resume_point(config, scanned, problems, processes, start=start)
        if resume and (remark := process_remark(resume, scanned, processes)):
            warnings.append(remark)
    if config is None or scanned is None or scanned.problems or not scanned.datasets:
        raise UserError(problems)
    seed = resume.manifest.seed if resume else config.training.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "big")
    num_batches = count_batches(scanned.datasets, processes)
    if not num_batches:
        # Why there are no images is among the problems.
        raise UserError(problems)
    counts = StepCounts.of(
        config.training,
        num_batches,
        warmup=config.scheduler.lr_warmup_steps,
        decay=config.scheduler.decay(),
    )
    problems.extend(_warmup_problems(config, counts))
    data_configs = (dataset.config for dataset in scanned.datasets)
    warnings.extend(warmup_remarks(data_configs, counts.total))
    steps_done = _steps_done(config, counts, resume, problems)
    if problems:
        raise UserError(problems)
    return Prepared(
        config=config,
        start=steps_done,
        host=host,
        scan=scanned,
        batches=BatchPlan(
            scanned.datasets,
            seed,
            accumulation=config.training.gradient_accumulation_steps,
            total_steps=counts.total,
            processes=processes,
        ),
        # Its own seed: runs that differ in theirs are validated on the same.
        validation=BatchPlan(scanned.validation, 0) if scanned.validation else None,
        counts=counts,
        seed=seed,
        processes=processes,
        resume=resume,
        warnings=warnings,
        given=settings,
    )


def _checked(
    config: RunConfig, scanned: Scan | None, processes: int, *, start: bool
) -> tuple[list[Problem], list[str]]:
    """Give what is wrong with options that are valid by themselves, and what there is to say."""
    problems: list[Problem] = []
    remarks: list[str] = []
    for component in config.components:
        problems.extend(component.check(config))
        remarks.extend(component.remarks(config))
    problems.extend(config.metadata.check(config))
    problems.extend(config.processes.check(config, processes))
    remarks.extend(config.processes.remarks(config, processes))
    if start:
        problems.extend(machine_problems(config))
    else:
        remarks.extend(f"not on this machine: {item}" for item in machine_problems(config))
    problems.extend(rule_problems(config, scanned))
    remarks.extend(rule_remarks(config, scanned))
    return problems, remarks


def _warmup_problems(config: RunConfig, counts: StepCounts) -> Iterator[Problem]:
    if counts.warmup > counts.total:
        yield Problem(
            place=config.place("lr_warmup_steps"),
            message=f"{counts.warmup} warm-up steps in a run of {counts.total} steps",
            remedy="shorten the warm-up or train longer",
        )


def _steps_done(
    config: RunConfig, counts: StepCounts, resume: ResumePoint | None, problems: list[Problem]
) -> int:
    """Give the steps that count as done: as the options say, else as many as the state has."""
    training = config.training
    if training.initial_step is not None:
        option, start = "initial_step", training.initial_step
    elif training.initial_epoch is not None:
        option, start = "initial_epoch", (training.initial_epoch - 1) * counts.steps_per_epoch
    else:
        return resume.manifest.step if resume else 0
    if start >= counts.total:
        problems.append(
            Problem(
                place=config.place(option),
                message=f"begins behind step {start} of a run of {counts.total} steps: nothing "
                f"is left",
                remedy="begin earlier, or raise --max_train_steps or --max_train_epochs, which "
                "are totals",
            )
        )
    return start


def _resume_point(
    config: RunConfig, scanned: Scan, problems: list[Problem], processes: int, *, start: bool
) -> ResumePoint | None:
    try:
        point = find_resume_point(config, whole=start and not problems)
    except UserError as error:
        problems.extend(error.problems)
        return None
    if point is not None:
        problems.extend(differences(point, config, scanned, processes))
    return point


def _scan(
    resolution: Resolution, problems: list[Problem], warnings: list[str], *, decode: bool
) -> Scan | None:
    if resolution.dataset is None:
        return None
    model = resolution.model or Model
    place = resolution.place
    datasets, faults, notes = resolve_datasets(
        resolution.dataset, place, resolution=model.resolution
    )
    problems.extend(faults)
    warnings.extend(notes)
    if not datasets:
        return None
    skip_bad = resolution.dataset.on_bad_image == "skip"
    scanned = scan(
        datasets,
        bucket_multiple=model.bucket_multiple,
        place=place,
        index=user_index(),
        skip_bad=skip_bad,
        strict_captions=resolution.dataset.strict_captions,
        decode=decode or skip_bad,
    )
    problems.extend(scanned.problems)
    warnings.extend(scanned.warnings)
    if remark := scanned.index.save():
        warnings.append(remark)
    return scanned
