"""A folder of distributions laid out as an installer does, and the command run beside it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

import pytest

from sdxl_train.plugins import PluginHost
from sdxl_train.registry import Registry
from sdxl_train.resolve import Resolution, Resolver
from sdxl_train.settings import from_words, merge

if TYPE_CHECKING:
    from pathlib import Path

Command: TypeAlias = Callable[..., "subprocess.CompletedProcess[str]"]
Resolve: TypeAlias = Callable[..., Resolution]

NOISE = """
from sdxl_train import Field, Noise, hookimpl

class Grain(Noise):
    \"\"\"Grain, for tests.\"\"\"
    grain: float | None = Field(None, ge=0, description="Strength of the grain.")

    def build(self, schedule):
        return lambda noise, latents, timesteps, generator: noise * (1 + self.grain)

@hookimpl
def register_noises():
    return {"grain": Grain}
"""

LOSS = """
from sdxl_train import Loss, hookimpl

class Absolute(Loss):
    \"\"\"Absolute error, for tests.\"\"\"

    def build(self, schedule):
        return lambda prediction, target, timesteps: (prediction - target).abs()

@hookimpl
def register_losses():
    return {"absolute": Absolute}
"""


class Site:
    """A folder on the import path with distributions in it."""

    noise = NOISE
    loss = LOSS

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(
        self,
        name: str,
        code: str | None = NOISE,
        *,
        version: str = "1.0",
        distribution: str | None = None,
        target: str | None = None,
        requires: str | None = None,
    ) -> str:
        """Lay out a distribution whose entry point ``name`` names a module of this code.

        Gives the name of the module. Without code there is none, and the entry point dangles.
        """
        distribution = distribution or f"{name}-dist"
        module = f"{distribution}_module".replace("-", "_")
        if code is not None:
            (self.path / f"{module}.py").write_text(code, encoding="utf-8")
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
            + (f"Requires-Dist: {requires}\n" if requires else ""),
            encoding="utf-8",
        )
        (info / "entry_points.txt").write_text(
            f"[sdxl_train]\n{name} = {target or module}\n", encoding="utf-8"
        )
        importlib.invalidate_caches()
        return module


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Give a folder that is on the import path, here and in the commands that a test runs."""
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    before = set(sys.modules)
    yield Site(path)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def command(site: Site, tmp_path: Path) -> Command:
    """Give a function that runs ``sdxl-train`` with these words, in an empty folder."""
    folder = tmp_path / "cwd"
    folder.mkdir()

    def run(
        *words: str, environment: Mapping[str, str] | None = None, cwd: Path = folder
    ) -> subprocess.CompletedProcess[str]:
        paths = {"PYTHONPATH": str(site.path), "COLUMNS": "100"}
        return subprocess.run(
            [sys.executable, "-m", "sdxl_train", *words],
            cwd=cwd,
            env={**os.environ, **paths, **(environment or {})},
            capture_output=True,
            encoding="utf-8",
            check=False,
            timeout=100,
        )

    return run


@pytest.fixture
def resolve(tmp_path: Path) -> Resolve:
    """Give a function that resolves a command line; the required options are given already."""

    def resolved(*words: str) -> Resolution:
        output = str(tmp_path / "out")
        flags = ["--pretrained_model_name_or_path", "base", "--output_dir", output]
        notices: list[str] = []
        settings = merge(from_words([*flags, *words], notices)[0], notices)
        host = PluginHost()
        resolution = Resolver(settings, host, Registry(host)).resolve()
        resolution.notices.extend(notices)
        return resolution

    return resolved
