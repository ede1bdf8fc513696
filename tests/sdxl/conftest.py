"""Tiny SDXL models, written once for all tests here, and a stand-in for the run's configuration."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from sdxl_lora_plugins.model import Sdxl
from sdxl_lora_plugins.model.tiny import write_tiny_sdxl

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdxl_lora_plugins.model.loaded import LoadedSdxl
    from sdxl_train import RunConfig

DATA = Path(__file__).parent.parent / "data"
SEED = 7


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keep torch from spreading tiny work over busy cores: it would wait more than work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """Read a golden file by its name without ``.json.gz``."""

    def read(name: str) -> Any:
        return json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))

    return read


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL as a diffusers folder. Not to be written to."""
    return write_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "folder", seed=SEED)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tiny SDXL as a single file. Not to be written to."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    return write_tiny_sdxl(path, seed=SEED, single_file=True)


@pytest.fixture(scope="session")
def load_sdxl() -> Callable[..., LoadedSdxl]:
    """Build the component from a path and options."""

    def load(path: Path | str, device: str = "cpu", **options: Any) -> LoadedSdxl:
        dtype = options.pop("dtype", torch.float32)
        return Sdxl(pretrained_model_name_or_path=str(path), **options).build(device, dtype)

    return load


@pytest.fixture
def run_config() -> Callable[..., RunConfig]:
    """Make what ``Sdxl.check`` reads of a configuration."""

    def make(model: Sdxl, *, learning_rate: float = 1e-4, cache: bool = False) -> RunConfig:
        stand_in = SimpleNamespace(
            model=model,
            optimizer=SimpleNamespace(learning_rate=learning_rate),
            dataset=SimpleNamespace(cache_text_encoder_outputs=cache),
            place=lambda name: f"--{name}",
        )
        return cast("RunConfig", stand_in)

    return make


@pytest.fixture
def sizes() -> Callable[[int], dict[str, torch.Tensor]]:
    """Make the size conditioning of a batch of 64 x 96 images."""

    def make(batch: int) -> dict[str, torch.Tensor]:
        return {
            "original_size": torch.tensor([[100, 151]] * batch),
            "crop_top_left": torch.tensor([[0, 6]] * batch),
            "target_size": torch.tensor([[64, 96]] * batch),
        }

    return make
