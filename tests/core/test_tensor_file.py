"""The writer of tensors against the format's library."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from sdxl_train import TensorEntry, TrainingError, hashes_of, write_tensors

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
    entries = {
        name: TensorEntry(tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()
    }
    write_tensors(path, entries, given.__getitem__, METADATA)
    return path


def test_a_streamed_file_is_that_of_the_library_with_the_hashes_of_sd_scripts(
    tmp_path: Path,
) -> None:
    given = tensors()
    ours = written(tmp_path / "ours.safetensors", given)

    read = load_file(ours)
    assert read.keys() == given.keys()
    assert all(torch.equal(read[name], given[name]) for name in read)
    of_training = {name: text for name, text in METADATA.items() if name.startswith("ss_")}
    plain = save(given, of_training)
    header = 8 + int.from_bytes(plain[:8], "little")
    hashes = {
        "sshs_model_hash": hashlib.sha256(plain[header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8],
    }
    with safe_open(ours, "pt") as file:
        assert file.metadata() == METADATA | hashes
    assert hashes_of(ours) == hashes


def test_a_file_of_the_library_has_the_same_hashes(tmp_path: Path) -> None:
    path = tmp_path / "library.safetensors"
    path.write_bytes(save(tensors(), METADATA))

    assert hashes_of(path) == hashes_of(written(tmp_path / "ours.safetensors", tensors()))


def test_a_number_that_is_not_finite_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"earlier")

    with pytest.raises(TrainingError, match="half is not finite as F16"):
        written(path, {**tensors(), "half": torch.tensor([float("nan")]).half()})

    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be written: No such file"):
        written(tmp_path / "no" / "a.safetensors", tensors())


def test_a_full_disk_is_told_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdxl_train.tensor_file.free_bytes", lambda folder: 1000)

    with pytest.raises(TrainingError, match="and the disk has 1,000 free"):
        written(tmp_path / "a.safetensors", tensors())

    assert not list(tmp_path.iterdir())
