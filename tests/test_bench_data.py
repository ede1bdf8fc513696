"""The benchmark of the data side runs, in miniature, and its figures are there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench" / "data.py"


def test_scanning_is_measured_from_the_first_to_the_second_start() -> None:
    words = ["--images", "4", "--to_decode", "2", "--only", "scan", "--json"]
    done = subprocess.run(
        [sys.executable, str(BENCH), *words], capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout)["scan"]
    assert (figures["plan: images"], figures["training: images"]) == (4, 2)
    assert all(value > 0 for name, value in figures.items() if not name.endswith("image"))
