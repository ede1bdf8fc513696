"""Pictures small enough for a page, each made once however often the page is rewritten."""

from __future__ import annotations

import base64
import io
import logging
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

BUDGET_BYTES = 2_600_000
"""Of all sample pictures as text in the page."""
_SAMPLE_SIDE, _THUMBNAIL_SIDE = 384, 96


class Pictures:
    """Makes ``data:`` addresses of picture files, and keeps them."""

    def __init__(self) -> None:
        self._made: dict[tuple[Path, int, int], str | None] = {}

    def sample(self, path: Path) -> str | None:
        """Give a sample picture; None if it cannot be read."""
        return self._small(path, _SAMPLE_SIDE)

    def thumbnail(self, path: Path) -> str | None:
        """Give a training image, very small; None if it cannot be read."""
        return self._small(path, _THUMBNAIL_SIDE)

    def _small(self, path: Path, side: int) -> str | None:
        try:
            key = (path, path.stat().st_mtime_ns, side)
            if key not in self._made:
                self._made[key] = _address(path, side)
            return self._made[key]
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            logger.info("no picture of %s in the report: %s", path, error)
            return None


def _address(path: Path, side: int) -> str:
    with Image.open(path) as image:
        image.draft("RGB", (side, side))
        small = ImageOps.exif_transpose(image).convert("RGB")
        small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=72)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def sample_grid(
    samples: Sequence[Mapping[str, Any]], folder: Path, pictures: Pictures, budget: int
) -> dict[str, Any]:
    """Arrange samples by step and prompt.

    Where the pictures of all steps would take more than ``budget`` bytes, steps are left out
    evenly; the first and the newest stay.

    Returns:
        ``steps``; ``prompts``: for each the request and ``cells``, one for each step, with
        ``picture``, ``fault`` and ``file``; ``left_out``: how many steps are.
    """
    by_step: dict[int, dict[int, Mapping[str, Any]]] = {}
    for sample in samples:
        by_step.setdefault(sample["step"], {})[sample["index"]] = sample
    every = sorted(by_step)
    cells = {
        step: {index: _cell(s, folder, pictures) for index, s in by_step[step].items()}
        for step in _affordable(every, by_step, folder, pictures, budget)
    }
    indices = sorted({index for step in cells for index in cells[step]})
    newest = {index: sample for step in every for index, sample in by_step[step].items()}
    return {
        "steps": list(cells),
        "prompts": [
            {**newest[index], "cells": [cells[step].get(index) for step in cells]}
            for index in indices
        ],
        "left_out": len(every) - len(cells),
    }


def _affordable(
    steps: Sequence[int],
    by_step: Mapping[int, Mapping[int, Mapping[str, Any]]],
    folder: Path,
    pictures: Pictures,
    budget: int,
) -> list[int]:
    """Choose steps, evenly, whose pictures are within the budget; at least the newest."""
    sizes = {
        step: sum(
            len(_cell(sample, folder, pictures)["picture"] or "")
            for sample in by_step[step].values()
        )
        for step in steps
    }
    stride = 1
    while True:
        chosen = [s for i, s in enumerate(steps) if i % stride == 0 or i == len(steps) - 1]
        if sum(sizes[step] for step in chosen) <= budget or stride >= len(steps):
            return chosen if stride < max(2, len(steps)) else list(steps[-1:])
        stride += 1


def _cell(sample: Mapping[str, Any], folder: Path, pictures: Pictures) -> dict[str, Any]:
    path = None if sample["path"] is None else folder / sample["path"]
    return {
        "picture": path and pictures.sample(path),
        "fault": sample["fault"],
        "file": sample["path"],
    }
