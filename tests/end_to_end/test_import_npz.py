"""Latents of sd-scripts are taken over where they are the VAE's, and nowhere else."""

from __future__ import annotations

import pickle
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_train.cli import main
from sdxl_train.data.foreign_latents import agreeing
from sdxl_train.data.listing import CACHE_FOLDER
from sdxl_train.ldm.npz import find_npz, read_npz
from tests.end_to_end.conftest import as_flags

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from tests.end_to_end.conftest import MakeOptions

SCALING = 0.13025
"""Of SDXL's latents, before they go to the U-Net."""


def as_sd_scripts(image: Path, latents: np.ndarray[Any, Any], **more: Any) -> Path:
    """Write latents as reference 6.1 has it."""
    with Image.open(image) as opened:
        width, height = opened.size
    path = image.with_name(f"{image.stem}_{width:04d}x{height:04d}_sdxl.npz")
    np.savez(path, latents=latents, original_size=np.array([width, height]), **more)
    return path


def test_the_command_takes_over_what_it_can_verify(
    options: MakeOptions, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photographs" / "2_photo"
    shutil.copytree(photographs / "2_photo", folder)
    words = as_flags(
        options(train_data_dir=str(folder.parent), output_dir=None, cache_latents_to_disk=True)
    )

    def encodings() -> list[Tensor]:
        return [load_file(path)["latents"] for path in sorted((folder / CACHE_FOLDER).iterdir())]

    assert main(["cache", *words]) == 0
    own = encodings()
    shutil.rmtree(folder / CACHE_FOLDER)
    # sd-scripts keeps a draw from the posterior. The same one is beside three images, and right for
    # the one of them that it was made of.
    one = next(latents for latents in own if latents.shape == (4, 8, 8))
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = one + 0.05 * one.std() * noise
    for name in ("astronaut", "coffee", "rocket"):
        as_sd_scripts(folder / f"{name}.png", (drawn / SCALING).numpy())
    (folder / "chelsea.npz").write_bytes(pickle.dumps({"latents": 1}))

    assert main(["cache", *words, "--import_npz"]) == 0
    told = capsys.readouterr().err
    assert "of another program: 3 not taken over; 1 taken over" in told
    assert "2 files: latents of another program that are not what the encoder makes of" in told
    assert "chelsea.npz) are damaged, or no arrays" in told
    kept = encodings()
    assert sum(torch.equal(a, b) for a, b in zip(own, kept, strict=True)) == 4
    assert any(latents.shape == drawn.shape and torch.allclose(latents, drawn) for latents in kept)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.b.png"
    Image.new("RGB", (96, 64)).save(path)
    return path


def test_both_names_of_the_files_are_known(image: Path) -> None:
    assert find_npz(image, (96, 64), "_sdxl") is None
    path = as_sd_scripts(
        image, np.ones((4, 8, 12), np.float32), latents_flipped=np.zeros((4, 8, 12))
    )
    assert path.name == "a.b_0096x0064_sdxl.npz"
    assert find_npz(image, (96, 64), "_sdxl") == path
    found = read_npz(path, (96, 64))
    assert {flipped: t.mean().item() for flipped, t in found.items()} == {False: 1.0, True: 0.0}
    path.replace(image.with_name("a.b.npz"))
    assert find_npz(image, (96, 64), "_sdxl") == image.with_name("a.b.npz")


def explosive(path: Path) -> None:
    np.savez(path, latents=np.array([Explosive()], dtype=object))


def bare_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


class Explosive:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("was unpickled",)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "81 cut off": (lambda path: path.write_bytes(path.read_bytes()[:-30]), "damaged"),
    "81 empty": (lambda path: path.write_bytes(b""), "damaged"),
    "82 other arrays": (lambda path: np.savez(path, tags=np.zeros(3)), "hold no latents"),
    "82 other image": (
        lambda path: np.savez(path, latents=np.zeros((4, 8, 8)), original_size=[64, 64]),
        "another size",
    ),
    "82 a bare array": (bare_array, "hold no latents"),
    "83 no size": (lambda path: np.savez(path, latents=np.zeros((4, 8, 8))), "another size"),
    "84 pickled objects": (explosive, "damaged"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_says_what_is_wrong_and_runs_no_code(fault: str, image: Path) -> None:
    path = as_sd_scripts(image, np.ones((4, 8, 12), np.float32))
    spoil, message = BAD[fault]
    spoil(path)
    with pytest.raises(ValueError, match=message):
        read_npz(path, (96, 64))


def test_latents_agree_unless_a_part_of_them_differs() -> None:
    own = torch.randn(4, 20, 12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(agreeing(own * 1.1, own), own * 1.1)
    edited = own.clone()
    edited[:, 16:, 8:] = 0  # a corner of 4x4, the rest as it was
    nan = own.clone()
    nan[0, 0, 0] = torch.nan
    for theirs, message in (
        (None, "lack the mirrored form"),
        (own[:, :8], "have another size, 4x8x12 instead of 4x20x12"),
        (edited, "are not what the encoder makes"),
        (own.flip(2), "are not what the encoder makes"),
        (nan, "are not what the encoder makes"),
    ):
        with pytest.raises(ValueError, match=message):
            agreeing(theirs, own)
