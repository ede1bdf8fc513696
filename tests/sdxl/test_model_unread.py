"""What needs no encoder reads none; what does gets what it would have had from the start."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import torch

from sdxl_lora_plugins.fp8 import Fp8Format
from sdxl_lora_plugins.model import SDXL, TINY
from sdxl_train import UserError
from sdxl_train.ldm import unread
from sdxl_train.ldm.hashes import weights_hash
from sdxl_train.ldm.tiny import write_tiny
from sdxl_train.ldm.unread import remembered

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from sdxl_train.ldm.loaded import LoadedLdm

Load: TypeAlias = "Callable[..., LoadedLdm]"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Believe files at once, though they were written just now; with nothing known before."""
    monkeypatch.setattr(unread, "is_settled", lambda stamp: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "known"))


def encoders(model: LoadedLdm) -> list[nn.Module]:
    """Give VAE and text encoders as they are, without asking for their weights."""
    assert model._vae is not None
    return [model._vae, *model._text_encoders]


def are_read(model: LoadedLdm) -> list[bool]:
    return [not any(p.is_meta for p in module.parameters()) for module in encoders(model)]


@pytest.mark.parametrize("source", ["tiny_file", "tiny_folder"])
@pytest.mark.usefixtures("settled")
def test_known_identities_read_no_encoder(
    source: str, request: pytest.FixtureRequest, load_sdxl: Load
) -> None:
    path = request.getfixturevalue(source)
    first = load_sdxl(path, network_train_unet_only=True)
    identities = (first.image_encoder_identity(), first.text_encoders_identity())
    assert are_read(first) == [True, True, True]
    again = load_sdxl(path, network_train_unet_only=True)
    assert (again.image_encoder_identity(), again.text_encoders_identity()) == identities
    assert are_read(again) == [False, False, False]
    # Nor does letting go of them.
    again.release_image_encoder()
    again.release_text_encoders()
    assert first.vae is not None
    assert identities[0]["the VAE"] == weights_hash([first.vae], [str(first.latent_scaling)])
    assert identities[1]["the text encoders"] == weights_hash(first.text_encoders, [])


@pytest.mark.usefixtures("settled")
def test_identities_follow_precision_and_file(
    tiny_file: Path, tmp_path: Path, load_sdxl: Load
) -> None:
    path = shutil.copy(tiny_file, tmp_path / "base.safetensors")

    def identities(*, packed: bool = False, **options: Any) -> set[str]:
        model = load_sdxl(path, network_train_unet_only=True, **options)
        if packed:
            model.quantize(Fp8Format(), denoiser_only=False)
        return {
            model.image_encoder_identity()["the VAE"],
            model.text_encoders_identity()["the text encoders"],
        }

    seen = [identities() for _ in range(2)]
    assert seen[0] == seen[1]
    half = identities(vae_dtype="bf16", dtype=torch.bfloat16)
    assert not half & seen[0]
    (packed,) = identities(packed=True) - seen[0]
    assert packed not in half
    other = write_tiny(tmp_path / "other.safetensors", SDXL, TINY, seed=5, single_file=True)
    other.replace(path)
    assert not identities() & seen[0]


def test_encoders_are_read_one_by_one(tiny_file: Path, load_sdxl: Load) -> None:
    model = load_sdxl(tiny_file, network_train_unet_only=True)
    assert are_read(model) == [False, False, False]
    model.encode_images(torch.zeros(1, 3, 32, 32))
    assert are_read(model) == [True, False, False]
    model.release_image_encoder()
    model.encode_text(["a cat"])
    assert not any(p.is_meta for encoder in model._text_encoders for p in encoder.parameters())


def test_parts_that_train_are_read_with_the_network(tiny_file: Path, load_sdxl: Load) -> None:
    model = load_sdxl(tiny_file, text_encoder_lr=[1e-4, 0])
    assert are_read(model) == [False, False, False]
    assert [part.name for part in model.parts] == ["unet", "te1"]
    assert are_read(model) == [False, True, False]
    assert not any(p.is_meta for p in model.denoiser.parameters())


def test_sampler_has_its_decoder_at_once(tiny_file: Path, load_sdxl: Load) -> None:
    """Hours later the file might be gone."""
    model = load_sdxl(tiny_file, network_train_unet_only=True)
    sampler = model.sampler()
    model.release_image_encoder()
    assert not any(p.is_meta for p in sampler.vae.parameters())


def test_file_that_changes_before_it_is_read_is_refused(
    tiny_file: Path, tmp_path: Path, load_sdxl: Load
) -> None:
    path = shutil.copy(tiny_file, tmp_path / "base.safetensors")
    model = load_sdxl(path, network_train_unet_only=True)
    write_tiny(tmp_path / "o.safetensors", SDXL, TINY, seed=5, single_file=True).replace(path)
    with pytest.raises(UserError, match="was changed while"):
        model.encode_images(torch.zeros(1, 3, 32, 32))


@pytest.mark.usefixtures("settled")
def test_merging_into_an_encoder_changes_its_identity_only(
    tiny_file: Path, tmp_path: Path, load_sdxl: Load
) -> None:
    from safetensors.torch import save_file

    def identities(layer: str | None) -> list[Any]:
        model = load_sdxl(tiny_file, network_train_unet_only=True)
        if layer is not None:
            shapes: list[Any] = [
                part.module.get_submodule(path).weight.shape
                for part in (*model.parts, *model.frozen_parts)
                for path, name in part.file_names.items()
                if f"{part.prefix}_{name}" == layer
            ]
            (shape,) = shapes
            network = tmp_path / f"{layer}.safetensors"
            tensors = {
                f"{layer}.lora_down.weight": torch.ones(1, shape[1]),
                f"{layer}.lora_up.weight": torch.ones(shape[0], 1),
                f"{layer}.alpha": torch.tensor(1.0),
            }
            save_file(tensors, network)
            model.merge_networks([(network, 1.0)])
        return [model.image_encoder_identity(), model.text_encoders_identity()]

    plain = identities(None)
    assert identities("lora_unet_middle_block_1_proj_in") == plain
    merged = identities("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    assert merged[0] == plain[0]
    assert merged[1]["the text encoders"] != plain[1]["the text encoders"]
    # What was merged is nothing that follows from the file.
    assert identities(None) == plain


@pytest.mark.usefixtures("settled")
def test_what_is_remembered_is_computed_once_for_each_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    calls: list[str] = []

    def compute() -> str:
        calls.append(path.read_text())
        return calls[-1]

    assert [remembered([path], ["what"], compute) for _ in range(3)] == ["one"] * 3
    assert remembered([path], ["else"], compute) == "one"
    path.write_text("another")
    assert remembered([path], ["what"], compute) == "another"
    for damaged in (tmp_path / "known").rglob("*.json"):
        damaged.write_text('{"stamps": 1}')
    assert remembered([path], ["what"], compute) == "another"
    assert calls == ["one", "one", "another", "another"]


def test_what_was_written_just_now_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second write might bear the same time."""
    monkeypatch.setattr(unread, "is_settled", lambda stamp: False)
    path = tmp_path / "file"
    path.write_text("one")
    calls = iter("ab")
    assert [remembered([path], [], lambda: next(calls)) for _ in range(2)] == ["a", "b"]
