"""What a run will do, told before it does it; the run that follows matches it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sdxl_train.assembly import (
    SAVED_DTYPES,
    WEIGHT_DTYPES,
    assemble,
    build_optimizer,
    saved_precision,
)
from sdxl_train.checkpoint import FOLDER_FORMATS, kept
from sdxl_train.counts import SavePoint
from sdxl_train.data.lengths import CaptionLengths
from sdxl_train.data.report import dataset_report
from sdxl_train.disk import room_problem, room_remark
from sdxl_train.errors import UserError
from sdxl_train.validation import validation_due

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from sdxl_train.assembly import Assembly, ModuleCount
    from sdxl_train.config import RunConfig
    from sdxl_train.errors import Problem
    from sdxl_train.preflight import Prepared


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run. :meth:`as_json` is an interface: its keys stay."""

    plugins: list[dict[str, str]]
    options: Mapping[str, Mapping[str, Any]]
    dataset: Mapping[str, Any]
    steps: Mapping[str, int]
    saves: list[int]
    samples: list[int]
    validations: list[int]
    modules: Mapping[str, ModuleCount]
    groups: list[dict[str, Any]]
    memory: Mapping[str, int]
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Give the plan as plain JSON values."""
        document = asdict(self)
        for part in document["modules"].values():
            del part["title"]
        return {**document, "errors": []}


def make_plan(prepared: Prepared, *, foretells_peak: bool = False) -> Plan:
    """Plan a run from the shapes of its model; no weights are read.

    Args:
        prepared: The run.
        foretells_peak: Tell the peak of memory too, which takes some seconds.

    Raises:
        UserError: If the model or the network cannot be built as asked.
    """
    config, counts = prepared.config, prepared.counts
    assembly = assemble(config, "meta", prepared.seed)
    _try_components(prepared, assembly)
    groups = [
        {
            "name": group["name"],
            "lr": None if config.optimizer.brings_schedule() else group["lr"],
            "tensors": len(group["params"]),
            "parameters": sum(parameter.numel() for parameter in group["params"]),
        }
        for group in assembly.groups
    ]
    room = _room(prepared, assembly)
    memory, model = _memory(prepared, assembly), assembly.model
    lengths = CaptionLengths.of(prepared.scan, model.max_tokens, model.count_tokens)
    warnings = [*prepared.warnings, *lengths.remarks(), *_rate_remarks(config, groups), *room]
    if foretells_peak:
        # It takes a part of torch that other plans do without.
        from sdxl_train.fitting import remarks
        from sdxl_train.footprint import foretell

        memory |= foretell(prepared, assembly, memory)
        warnings += remarks(prepared, memory, _forecast)
    return Plan(
        plugins=[
            {"name": plugin.name, "distribution": plugin.distribution, "version": plugin.version}
            for plugin in config.plugins
        ],
        options=config.options(),
        dataset={**dataset_report(prepared.scan), "captions": lengths.as_json()},
        steps={
            "batches_per_epoch": counts.batches_per_epoch,
            "epochs": counts.epochs,
            "optimizer_steps": counts.total,
            "warmup_steps": counts.warmup,
            "processes": prepared.processes,
        },
        saves=prepared.saves.steps(),
        samples=_sample_steps(prepared),
        validations=_validation_steps(prepared),
        modules=assembly.parts,
        groups=groups,
        memory=memory,
        warnings=warnings,
    )


def _sample_steps(prepared: Prepared) -> list[int]:
    """Give every step after which an observer samples pictures."""
    observers = prepared.config.observers
    return sorted({step for item in observers for step in item.sample_steps(prepared.counts)})


def _validation_steps(prepared: Prepared) -> list[int]:
    """Give every step after which the loss on held-out images is measured."""
    if prepared.validation is None:
        return []
    steps = range(1, prepared.counts.total + 1)
    return [step for step in steps if validation_due(prepared.config, prepared.counts, step)]


def _rate_remarks(config: RunConfig, groups: list[dict[str, Any]]) -> Iterator[str]:
    """Say that an optimizer which finds its own rate wants a factor near 1."""
    rate = groups[0]["lr"]
    if config.optimizer.single_lr and not 0.1 < rate < 10:
        yield (
            f"the learning rate is {rate:g}, and {config.name_of('optimizer')} finds its own: "
            f"--learning_rate 1 is usual"
        )


def _try_components(prepared: Prepared, assembly: Assembly) -> None:
    """Let each component refuse its options, the model's noise schedule or the run's length.

    Raises:
        UserError: With what every one of them says.
    """
    config, schedule = prepared.config, assembly.model.schedule
    groups = [dict(group) for group in assembly.groups]
    builds: list[Callable[[], object]] = [
        partial(config.timesteps.build, schedule),
        partial(config.loss.build, schedule),
        *(partial(noise.build, schedule) for noise in config.noises),
        *(partial(weighting.build, schedule) for weighting in config.weightings),
        lambda: config.build_schedule(build_optimizer(config, groups), prepared.counts.step_plan),
    ]
    if config.output.save_model_as in FOLDER_FORMATS:
        builds.append(partial(_try_format, config, assembly))
    problems: list[Problem] = []
    for build in builds:
        try:
            build()
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(problems)


def _try_format(config: RunConfig, assembly: Assembly) -> None:
    """Refuse a network that the format of its files cannot hold.

    Raises:
        UserError: At the option that chose the format.
    """
    try:
        assembly.model.diffusers_network(assembly.adapter.state_dict())
    except UserError as error:
        place = config.place("save_model_as")
        raise UserError(replace(problem, place=place) for problem in error.problems) from error


def _room(prepared: Prepared, assembly: Assembly) -> list[str]:
    """Compare what the run saves with the free space of its disk.

    Raises:
        UserError: If there is no room for even one save.
    """
    output = prepared.config.output
    parameters = sum(parameter.numel() for parameter in assembly.parameters)
    network = parameters * SAVED_DTYPES[saved_precision(prepared.config)].itemsize
    # Most optimizers keep two fp32 values for each weight, which a state holds as well.
    state = parameters * 4 * 3
    points = [point for step in prepared.saves.steps() for point in prepared.saves.due(step)]
    if output.save_best:
        points.append(SavePoint(kind="best", number=0))
    one = max(point.network * network + point.state * state for point in points)
    problem = room_problem(prepared.config.place("output_dir"), output.output_dir, one)
    if problem is not None:
        raise UserError([problem])
    networks, states = kept(output, points)
    remark = room_remark(output.output_dir, networks * network + states * state, networks + states)
    return [remark] if remark else []


def _forecast(prepared: Prepared, process: int) -> dict[str, int]:
    """Give the memory of a plan with the peak in it, in a process of so many bytes.

    Raises:
        UserError: If the model or the network cannot be built as asked.
    """
    from sdxl_train.footprint import foretell

    assembly = assemble(prepared.config, "meta", prepared.seed)
    memory = _memory(prepared, assembly)
    return memory | foretell(prepared, assembly, memory, process)


def _memory(prepared: Prepared, assembly: Assembly) -> dict[str, int]:
    """Count the bytes that are certain: weights, and what trains with its gradient."""
    trained = {id(parameter) for parameter in assembly.parameters}

    def frozen(module: nn.Module) -> int:
        parameters = (p for p in module.parameters() if id(p) not in trained)
        return sum(p.numel() * p.element_size() for p in parameters)

    trained_width = WEIGHT_DTYPES[prepared.config.training.trained_precision].itemsize
    network = sum(parameter.numel() for parameter in assembly.parameters) * trained_width
    gradients = network
    if prepared.config.training.fused_backward_pass:
        gradients = max(parameter.numel() for parameter in assembly.parameters) * trained_width
    samples = bool(_sample_steps(prepared))
    return {
        "denoiser_bytes": frozen(assembly.model.denoiser),
        "text_encoder_bytes": sum(frozen(encoder) for encoder in assembly.model.text_encoders),
        "network_bytes": network,
        "gradient_bytes": gradients,
        **({"sample_decoder_bytes": assembly.model.sampler().decoder_bytes} if samples else {}),
    }
