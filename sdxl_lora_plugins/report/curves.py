"""Curves short enough for a page: the shape of thousands of points in a thousand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MOST_POINTS = 1000
_SHARE_SMOOTHED = 50
"""A smoothed loss looks back over about a fiftieth of the run."""

Curve = dict[str, Any]


def curve(
    steps: Sequence[float], values: Sequence[float | None], label: str, **style: Any
) -> Curve:
    """Give a curve for the page, thinned out."""
    xs, ys = thinned(steps, values)
    return {"label": label, "x": xs, "y": ys, **style}


def thinned(
    steps: Sequence[float], values: Sequence[float | None], most: int = MOST_POINTS
) -> tuple[list[float], list[float | None]]:
    """Keep the lowest and the highest value of each stretch, so that no spike is lost."""
    if len(steps) <= most:
        return list(steps), list(values)
    chosen: list[int] = []
    stretches = most // 2
    for stretch in range(stretches):
        members = range(stretch * len(steps) // stretches, (stretch + 1) * len(steps) // stretches)
        known = [index for index in members if values[index] is not None]
        if known:
            lowest = min(known, key=lambda index: values[index])  # type: ignore[arg-type, return-value]
            highest = max(known, key=lambda index: values[index])  # type: ignore[arg-type, return-value]
            chosen += sorted({lowest, highest})
    return [steps[index] for index in chosen], [values[index] for index in chosen]


def smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Give the exponential moving average, corrected for its start (Kingma and Ba 2015, sec. 3)."""
    keep = 1 - 1 / max(2.0, len(values) / _SHARE_SMOOTHED)
    total, weight = 0.0, 0.0
    result: list[float | None] = []
    for value in values:
        if value is not None:
            total = keep * total + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        result.append(total / weight if weight else None)
    return result


def charts(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Give the charts of one run, or of several in common ones."""
    several = len(runs) > 1

    def called(name: str, label: str) -> str:
        return f"{name}: {label}" if several else label

    pairs = list(zip(runs, names, strict=True))
    loss: list[Curve] = []
    for number, (run, name) in enumerate(pairs):
        steps, values = run["history"].get("step", []), run["history"].get("loss", [])
        if not several:
            loss.append(curve(steps, values, "each step", faint=True, colour=number))
        loss.append(curve(steps, smoothed(values), called(name, "smoothed"), colour=number))
    yield {"id": "loss", "title": "Loss", "curves": loss}
    yield {"id": "validation", "title": "Loss on held-out images", "curves": _validation(pairs)}
    for key, title in (("learning_rates", "Learning rate"), ("metrics", "Other numbers")):
        grouped = [
            curve(run["history"]["step"], values, called(name, label))
            for run, name in pairs
            for label, values in run["history"].get(key, {}).items()
        ]
        yield {"id": key.replace("_", "-"), "title": title, "curves": grouped}
    for key, title in (("grad_norm", "Gradient norm"), ("seconds", "Seconds per step")):
        each = [
            curve(run["history"]["step"], run["history"][key], called(name, title.lower()))
            for run, name in pairs
            if key in run["history"]
        ]
        yield {"id": key.replace("_", "-"), "title": title, "curves": each}


def _validation(pairs: Sequence[tuple[Mapping[str, Any], str]]) -> list[Curve]:
    several = len(pairs) > 1
    curves = []
    for run, name in pairs:
        results = run["results"]["validations"]
        steps = [result["step"] for result in results]
        if not results:
            continue
        curves.append(
            curve(steps, [r["loss"] for r in results], f"{name}: mean" if several else "mean")
        )
        if not several:
            curves += [
                curve(steps, [r["losses"][index] for r in results], f"at timestep {timestep}")
                for index, timestep in enumerate(results[0]["timesteps"])
            ]
    return curves
