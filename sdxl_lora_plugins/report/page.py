"""Make the page of runs out of their documents."""

from __future__ import annotations

import base64
import hashlib
import shlex
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import jinja2
from markupsafe import Markup

from sdxl_lora_plugins.report.curves import charts
from sdxl_lora_plugins.report.pictures import BUDGET_BYTES, Pictures, sample_grid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NUM_EXTREMES: Final = 10
"""Images with the highest and with the lowest loss that are shown."""
_ABSENT: Final = "absent"


@dataclass(frozen=True, kw_only=True)
class ShownRun:
    """A run to show.

    Attributes:
        name: What to call it.
        document: What its ``run.json`` holds.
        folder: Where that lies, with the pictures.
    """

    name: str
    document: Mapping[str, Any]
    folder: Path


def page(runs: Sequence[ShownRun], pictures: Pictures) -> bytes:
    """Make the page of a run, or of several side by side."""
    documents = [run.document for run in runs]
    names = [run.name for run in runs]
    drawn = [chart for chart in charts(documents, names) if chart["curves"]]
    script = Markup(_asset("templates/page.js"))
    library = Markup(_asset("uplot/uPlot.iife.min.js"))
    text = (
        _environment()
        .get_template("page.html")
        .render(
            title=" and ".join(names) if len(names) < 4 else f"{len(names)} runs",
            runs=[_view(run, pictures, BUDGET_BYTES // len(runs)) for run in runs],
            several=len(runs) > 1,
            charts=drawn,
            options=_options(runs),
            style=Markup(_asset("uplot/uPlot.min.css") + _asset("templates/page.css")),
            library=library,
            script=script,
            # Only these two scripts may run, whatever a caption holds; nothing is fetched.
            script_hashes=" ".join(f"'sha256-{_sha256(code)}'" for code in (library, script)),
        )
    )
    # Names of files that are no UTF-8 hold lone surrogates.
    return text.encode(errors="backslashreplace")


def _view(run: ShownRun, pictures: Pictures, budget: int) -> dict[str, Any]:
    """Give what the template shows of a run, beside the charts."""
    document = run.document
    images = document["loss_by_image"]
    # With few images, none is shown both as one of the worst and of the best.
    count = min(NUM_EXTREMES, (len(images) + 1) // 2)
    rows = [("highest", images[:count]), ("lowest", images[count:][-NUM_EXTREMES:][::-1])]
    return {
        "name": run.name,
        "document": document,
        "facts": dict(_facts(document)),
        "command": shlex.join(document["command"]),
        "extremes": [
            (title, [{**image, "picture": _thumbnail(image, pictures)} for image in members])
            for title, members in rows
            if members
        ],
        "samples": sample_grid(document["notes"].get("samples", []), run.folder, pictures, budget),
        "norms": _norms(document["notes"].get("weight_norms", {})),
        "timesteps": _bars(document["loss_by_timestep"]),
    }


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    results, history = document["results"], document["history"]
    losses, speed = history.get("average_loss", []), document["speed"]
    validations = [v for v in results["validations"] if v["loss"] is not None]
    best = min(validations, key=lambda v: v["loss"], default=None)
    peak = document["memory"]["peak_bytes"]
    trained = sum(part["parameters"] for part in document["plan"]["modules"].values())
    skipped = f", {results['skipped_steps']} skipped" if results["skipped_steps"] else ""
    return [
        ("steps", f"{results['steps']} of {document['steps']['optimizer_steps']}{skipped}"),
        ("loss, mean of an epoch", _number(losses[-1]) if losses else _ABSENT),
        (
            "lowest on held-out images",
            f"{_number(best['loss'])} after step {best['step']}" if best else _ABSENT,
        ),
        ("seconds per step", _number(speed["seconds_per_step"])),
        ("images per second", _number(speed["samples_per_second"])),
        (
            "most memory",
            f"{peak / 1e9:.2f} GB of the {document['memory']['of']}" if peak else _ABSENT,
        ),
        ("model FLOPs utilization", _utilization(document["notes"].get("mfu"))),
        ("trained parameters", f"{trained:,}"),
        ("device", f"{document['machine']['device_name']} ({document['machine']['device']})"),
        ("time in steps", f"{speed['seconds']:.0f} s"),
    ]


def _utilization(mfu: Mapping[str, Any] | None) -> str:
    if mfu is None or mfu["value"] is None:
        return f"{_ABSENT}: {mfu['why'] if mfu else 'not measured'}"
    rate, peak = mfu["rate"] / 1e12, mfu["peak"] / 1e12
    return f"{mfu['value']:.1%}: {rate:.3g} of {peak:.3g} TFLOP/s ({mfu['peak_of']})"


def _options(runs: Sequence[ShownRun]) -> list[dict[str, Any]]:
    """Give the options with the value of each run, the ones that were set first.

    Of several runs, only those that differ.
    """
    options = [run.document["options"] for run in runs]
    rows = []
    for name in dict.fromkeys(name for each in options for name in each):
        values = [each.get(name, {"value": None, "origin": "not an option"}) for each in options]
        differs = any(value["value"] != values[0]["value"] for value in values)
        if len(runs) == 1 or differs:
            is_set = any(value["origin"] != "default" for value in values)
            rows.append({"name": name, "values": values, "is_set": is_set})
    return sorted(rows, key=lambda row: not row["is_set"])


def _thumbnail(image: Mapping[str, Any], pictures: Pictures) -> str | None:
    from pathlib import Path

    return pictures.thumbnail(Path(image["path"])) if image["path"] else None


def _bars(bins: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    highest = max((each["loss"] for each in bins if each["loss"] is not None), default=0) or 1
    return [{**each, "share": (each["loss"] or 0) / highest} for each in bins]


def _norms(noted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give each block's norms with the line of a small chart, in a box of 100 by 24."""
    steps, blocks = noted.get("steps", []), noted.get("blocks", {})
    highest = max((max(values) for values in blocks.values() if values), default=0) or 1
    rows = []
    for name, values in sorted(blocks.items(), key=lambda block: _place(block[0])):
        last = steps[-1] or 1
        points = " ".join(
            f"{100 * step / last:.1f},{24 - 22 * value / highest:.1f}"
            for step, value in zip(steps, values, strict=True)
        )
        rows.append({"block": name, "first": values[0], "last": values[-1], "line": points})
    return rows


def _place(block: str) -> tuple[int, int, str]:
    """Give where a block lies in the model: what comes in, the middle, what goes out, the rest."""
    side, _, number = block.partition(".")
    order = ("input_blocks", "middle_block", "output_blocks")
    return order.index(side) if side in order else len(order), int(number or 0), block


def _number(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.4g}"


def _sha256(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sdxl_lora_plugins.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    return environment


@cache
def _asset(path: str) -> str:
    return resources.files("sdxl_lora_plugins.report").joinpath(path).read_text(encoding="utf-8")
