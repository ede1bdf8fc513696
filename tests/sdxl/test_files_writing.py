"""The writer of the tools against the format's library and the hashes of training's saver."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdxl_lora_plugins.files import lowrank
from sdxl_lora_plugins.files.writing import Entry, hashes_of, write_tensors
from sdxl_train import TrainingError, UserError
from sdxl_train.checkpoint import save_network

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

METADATA = {"ss_output_name": "a", "note": "größer"}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "big": torch.randn(700, 600, generator=generator),
        "half": torch.randn(3, 5, generator=generator).half(),
        "brain": torch.randn(7, generator=generator).bfloat16(),
        "index": torch.arange(4),
        "none": torch.tensor([]),
        "alpha": torch.tensor(4.0),
    }


def written(path: Path, given: dict[str, Tensor]) -> Path:
    entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()}
    write_tensors(path, entries, given.__getitem__, METADATA)
    return path


def test_a_streamed_file_is_what_the_saver_of_training_writes(tmp_path: Path) -> None:
    given = tensors()
    ours = written(tmp_path / "ours.safetensors", given)
    save_network(tmp_path / "saver.safetensors", given, METADATA)

    read, expected = load_file(ours), load_file(tmp_path / "saver.safetensors")
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in read)
    with (
        safe_open(ours, "pt") as one,
        safe_open(tmp_path / "saver.safetensors", "pt") as other,
    ):
        assert one.metadata() == other.metadata()
        assert hashes_of(ours).items() <= other.metadata().items()


def test_a_number_that_is_not_finite_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"earlier")

    with pytest.raises(TrainingError, match="half is not finite as F16"):
        written(path, {**tensors(), "half": torch.tensor([float("nan")]).half()})

    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        written(tmp_path / "no" / "a.safetensors", tensors())


def test_a_product_is_decomposed_as_its_matrix_is() -> None:
    up, down = torch.randn(20, 6).double(), torch.randn(6, 30).double()

    u, s, v = lowrank.of_product(up, down)

    assert torch.allclose((u * s) @ v, up @ down)
    assert torch.allclose(s, torch.linalg.svdvals(up @ down)[:6])


def test_a_randomized_decomposition_errs_as_little_as_the_best_of_its_rank() -> None:
    torch.manual_seed(1)
    matrix = torch.randn(300, 200)

    up, down = lowrank.of_matrix(matrix, rank=8).factors()

    best = torch.linalg.svdvals(matrix)[8:].square().sum().sqrt()
    assert torch.linalg.matrix_norm(matrix - up @ down) < 1.01 * best
