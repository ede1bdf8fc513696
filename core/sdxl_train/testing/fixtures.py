"""Fixtures for tests of plugins: a tiny model, a tiny dataset, plugin files, tiny runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from sdxl_train.components import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from sdxl_train.components import Component, Model
    from sdxl_train.loop import StepResult
    from sdxl_train.observed import Run, RunResult
    from sdxl_train.protocols import LoadedModel


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A small random base model on disk. Not to be written to.

    Attributes:
        family: The component that reads it.
        path: Where it is: what ``--pretrained_model_name_or_path`` takes.
    """

    family: type[Model]
    path: Path

    def load(
        self, device: str = "cpu", dtype: torch.dtype | None = None, **options: Any
    ) -> LoadedModel:
        """Load it; in fp32 unless told otherwise."""
        import torch

        component = self.family(pretrained_model_name_or_path=str(self.path), **options)
        return component.build(device, dtype or torch.float32)


class WritePlugin(Protocol):
    """Writes a plugin to a file of its own."""

    def __call__(self, code: str, name: str = ...) -> Path:
        """Write ``code`` to ``NAME.py`` and give the path, which ``--plugin`` takes."""


class TrainTiny(Protocol):
    """Trains a tiny model for real."""

    def __call__(
        self,
        *,
        components: Iterable[Component] = (),
        events: Mapping[str, Callable[..., object]] | None = None,
        **options: Any,
    ) -> TinyRun:
        """Train with these options on top of those of a tiny run.

        ``components`` and ``events`` are those of :func:`sdxl_train.train`.
        """


@dataclass(frozen=True, kw_only=True)
class TinyRun:
    """A run that is over.

    Attributes:
        options: What it was asked.
        result: How it ended.
        losses: The loss of each of its steps.
        folder: Where its files are.
    """

    options: dict[str, Any]
    result: RunResult
    losses: list[float]
    folder: Path

    @property
    def path(self) -> Path:
        """The final network."""
        return self.result.files[-1]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the final network."""
        from safetensors.torch import load_file

        return load_file(self.path)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the final network."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return dict(file.metadata() or {})


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A small random model of the default family."""
    from sdxl_train.plugins import PluginHost
    from sdxl_train.registry import KIND_BY_NAME, Registry

    host = PluginHost()
    host.apply([], [])
    entry = Registry(host).default(KIND_BY_NAME["model"])
    assert entry is not None, "no model family is installed"
    family: Any = entry.component
    return TinyModel(
        family=family, path=family.write_tiny(tmp_path_factory.mktemp("tiny") / "model")
    )


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``--train_data_dir``: four pictures of 64 pixels, each with a caption."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("tiny-dataset")
    pictures = folder / "1_gradient"
    pictures.mkdir()
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    for number, colour in enumerate(("red", "green", "blue", "grey")):
        pixels = np.zeros((64, 64, 3), dtype=np.uint8)
        pixels[..., number if number < 3 else slice(None)] = (
            ramp[:, None] if number < 3 else ramp[:, None, None]
        )
        Image.fromarray(pixels).save(pictures / f"{colour}.png")
        caption = f"a {colour} gradient"
        (pictures / f"{colour}.txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture
def plugin_files(tmp_path: Path) -> WritePlugin:
    """Write a plugin's code to a file, to be named to ``plugin=[...]`` or ``--plugin``."""
    folder = tmp_path / "plugin-files"
    folder.mkdir()

    def write(code: str, name: str = "my_plugin") -> Path:
        path = folder / f"{name}.py"
        path.write_text(code, encoding="utf-8")
        return path

    return write


_LOSSES = "losses.txt"


class RecordLosses(Observer):
    """Writes the loss of each step to a file beside the network."""

    def build(self, run: Run) -> object:
        """Give what hears of the steps."""
        return _LossFile(run.output_dir / _LOSSES)


class _LossFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("", encoding="utf-8")

    def step_finished(self, step: StepResult) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            print(step.loss.item(), file=file)


@pytest.fixture(scope="session")
def train_tiny(
    tiny_model: TinyModel,
    tiny_dataset: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> TrainTiny:
    """Train a tiny model for a few steps, exactly as ``sdxl-train`` would.

    The options are those of the command line. A value of None leaves an option out.
    """
    from sdxl_train.api import train

    def run(
        *,
        components: Iterable[Component] = (),
        events: Mapping[str, Callable[..., object]] | None = None,
        **options: Any,
    ) -> TinyRun:
        folder = tmp_path_factory.mktemp("tiny-run")
        plugins = options.pop("plugin", [])
        if isinstance(plugins, (str, Path)):
            plugins = [plugins]
        given = {
            "pretrained_model_name_or_path": str(tiny_model.path),
            "train_data_dir": str(tiny_dataset),
            "output_dir": str(folder / "output"),
            "output_name": "tiny",
            "resolution": 64,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "max_train_steps": 3,
            "seed": 1,
            "max_data_loader_n_workers": 0,
            **options,
            "plugin": [*map(str, plugins)],
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        result = train(chosen, components=[*components, RecordLosses()], events=events)
        lines = (folder / "output" / _LOSSES).read_text(encoding="utf-8").split()
        return TinyRun(
            options=chosen,
            result=result,
            losses=[float(line) for line in lines],
            folder=folder / "output",
        )

    return run
