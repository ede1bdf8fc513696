"""Makers of small image folders and scans."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from PIL import Image

from sdxl_train.data.dataset_config import DatasetOptions, resolve_datasets
from sdxl_train.data.sources import Scan, scan

GOLDEN = Path(__file__).parents[2] / "data"


class MakeImage(Protocol):
    def __call__(
        self, path: Path, size: tuple[int, int] = (64, 64), caption: str | None = None
    ) -> Path: ...


class MakeScan(Protocol):
    def __call__(self, *, multiple: int = 8, **options: Any) -> Scan: ...


class ReadGolden(Protocol):
    def __call__(self, name: str) -> Any: ...


def flag(name: str) -> str:
    return f"--{name}"


@pytest.fixture
def golden() -> ReadGolden:
    def read(name: str) -> Any:
        return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))

    return read


@pytest.fixture
def make_image() -> MakeImage:
    """Write an image of smooth random colours; the same path gives the same pixels."""

    def make(path: Path, size: tuple[int, int] = (64, 64), caption: str | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(sum(path.name.encode()))
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return make


@pytest.fixture
def make_scan() -> MakeScan:
    """Resolve options that have no mistake in them, and scan."""

    def make(*, multiple: int = 8, **options: Any) -> Scan:
        options.setdefault("resolution", 64)
        configs, problems, _ = resolve_datasets(DatasetOptions(**options), flag)
        assert problems == []
        return scan(configs, bucket_multiple=multiple, place=flag)

    return make
