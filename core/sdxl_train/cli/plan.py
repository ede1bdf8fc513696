"""``sdxl-train plan``: what the run would do; no weights are read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sdxl_train.cli.console import warn
from sdxl_train.cli.invocation import CoreCommand
from sdxl_train.data.dataset_options import DEFAULT
from sdxl_train.data.findings import MOST_FOLDERS
from sdxl_train.errors import UserError
from sdxl_train.settings import is_on
from sdxl_train.wording import in_one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sdxl_train.cli.invocation import Invocation
    from sdxl_train.planning import Plan

_SUMMARY = "Check the options of a run and print what it would do; no weights are read."
_USAGE = f"""\
usage: sdxl-train plan FLAGS [--num_processes N] [--memory] [--json]

{_SUMMARY}

  FLAGS             those of training: see `sdxl-train --help`
  --num_processes   how many processes would train together, as with `accelerate launch`
  --memory          foretell the peak of memory too, by a step on tensors without data
  --json            one object: plugins, options, dataset, steps, saves, samples, validations,
                    modules, groups, memory, warnings, errors; with errors, the exit code is 2"""


def run(invocation: Invocation) -> int:
    """Print the plan, or as JSON the plan or what is wrong."""
    # Help, which has this module's command in its list, needs none of that.
    from sdxl_train.preflight import prepare

    as_json, foretells_peak = invocation.take_switch("json"), invocation.take_switch("memory")
    try:
        processes = invocation.take_number("num_processes")
        invocation.refuse_leading()
        for name in ("output_config", "debug_dataset"):
            if is_on(setting := invocation.settings.get(name)):
                assert setting is not None
                raise UserError.of(setting.place, "writes no file here", "leave out `plan`")
        prepared = prepare(invocation.settings, invocation.host, start=False, processes=processes)
        from sdxl_train.planning import make_plan

        plan = make_plan(prepared, foretells_peak=foretells_peak)
    except UserError as error:
        if as_json:
            print(json.dumps({"errors": [str(problem) for problem in error.problems]}, indent=2))
        raise
    if as_json:
        print(json.dumps(plan.as_json(), indent=2))
        return 0
    warn([*invocation.notices, *plan.warnings])
    print_plan(plan)
    return 0


COMMAND = CoreCommand(run=run, summary=_SUMMARY, usage=_USAGE)


def print_plan(plan: Plan) -> None:
    """Print a plan for people."""
    dataset, steps = plan.dataset, plan.steps
    rows = [
        ("images", _images(dataset)),
        *_datasets(dataset["datasets"]),
        ("buckets", ", ".join(_bucket(bucket) for bucket in dataset["buckets"])),
        (
            "steps",
            f"{_count(steps['optimizer_steps'], 'optimizer step')}: "
            f"{_count(steps['epochs'], 'epoch')} of "
            f"{_count(steps['batches_per_epoch'], 'batch', 'batches')}, "
            f"{_count(steps['warmup_steps'], 'step')} of warm-up"
            + (f", {steps['processes']} processes" if steps["processes"] > 1 else ""),
        ),
        ("saves", _after_steps(plan.saves)),
    ]
    if plan.samples:
        rows.append(("samples", _after_steps(plan.samples)))
    if plan.validations:
        rows.append(("validation", _after_steps(plan.validations)))
    for part in plan.modules.values():
        adapted = f"{part.modules} modules, {part.parameters:,} parameters"
        rows.append((part.title, adapted if part.modules else "not trained"))
    for group in plan.groups:
        rate = "rates of the optimizer's own" if group["lr"] is None else f"{group['lr']:g}"
        rows.append((f"group {group['name']}", f"{group['tensors']} tensors at {rate}"))
    rows.append(("memory", _memory(plan.memory)))
    rows.append(("plugins", ", ".join(_plugin(plugin) for plugin in plan.plugins)))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {in_one_line(text)}")
    for item in dataset["skipped"][:5]:
        print(f"{'left out':<{width}}  {in_one_line(item['path'])}: {item['reason']}")
    if len(dataset["skipped"]) > 5:
        print(f"{'':<{width}}  and {len(dataset['skipped']) - 5} more")


def _memory(memory: Mapping[str, int]) -> str:
    """Tell the peak, where it is foretold, else what is certain."""
    if "peak_bytes" not in memory:
        return f"{sum(memory.values()) / 1e9:.2f} GB of weights and gradients, plus activations"
    from sdxl_train.footprint import PHASES, phase_of_peak

    phase = PHASES[phase_of_peak(memory)]
    return (
        f"{memory['peak_bytes'] / 1e9:.2f} GB at most, {phase}; activations "
        f"{memory['activation_bytes'] / 1e9:.2f} GB, optimizer "
        f"{memory['optimizer_bytes'] / 1e9:.2f} GB"
    )


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def _images(dataset: object) -> str:
    assert isinstance(dataset, dict)
    text = f"{dataset['images']}, {dataset['repeats']} with repeats"
    if dataset["regularization"]:
        text += f", {dataset['regularization']} for regularization"
    if dataset["validation"]:
        text += f", {dataset['validation']} held out for validation"
    text += f"; {dataset['with_caption']} with a caption"
    return text + (f", {dataset['masks']} with a mask" if dataset["masks"] else "")


def _datasets(datasets: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Tell of each dataset and subset what it has, and the values that somebody set."""
    for number, dataset in enumerate(datasets, start=1):
        yield f"dataset {number}", _set_values(dataset["options"]) or "all values are defaults"
        for subset in dataset["subsets"][:MOST_FOLDERS]:
            own = {
                name: option
                for name, option in subset["options"].items()
                if name not in ("image_dir", "metadata_file")
            }
            has = _count(subset["images"], "image")
            has += f", {subset['with_caption']} with a caption"
            has += f", {subset['masks']} with a mask" if subset["masks"] else ""
            values = _set_values(own)
            yield "", f"{subset['source']}: {has}" + (f"; {values}" if values else "")
        if more := dataset["subsets"][MOST_FOLDERS:]:
            images = _count(sum(subset["images"] for subset in more), "image")
            yield "", f"and {_count(len(more), 'more folder')}: {images} (--json tells of each)"


def _set_values(options: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(
        # After the file and line, an origin names the key, which stands before it here.
        f"{name} {_value(option['value'])} ({option['origin'].partition(': ')[0]})"
        for name, option in options.items()
        if option["origin"] != DEFAULT
    )


def _value(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def _bucket(bucket: dict[str, Any]) -> str:
    width, height = bucket["resolution"]
    text = f"{width}x{height}: {bucket['images']}"
    shares = {"cut off": bucket["crop_share"], "enlarged": bucket["upscale_share"]}
    told = [f"{share:.0%} {what}" for what, share in shares.items() if share >= 0.005]
    return f"{text} ({', '.join(told)})" if told else text


def _after_steps(steps: list[int]) -> str:
    shown = [str(step) for step in steps]
    if len(shown) > 8:
        shown = [*shown[:4], "...", *shown[-2:]]
    return f"after step {', '.join(shown)}"


def _plugin(plugin: dict[str, str]) -> str:
    return f"{plugin['name']} ({plugin['distribution'] or 'file'} {plugin['version']})".strip()
