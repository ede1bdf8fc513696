"""What training sees of a loaded SDXL: parts, gradients, release, metadata."""

from __future__ import annotations

import gc
import hashlib
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sdxl_lora_plugins.model import Sdxl

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdxl_train import RunConfig
    from sdxl_train.ldm.loaded import LoadedLdm


def gradients(model: LoadedLdm, sizes: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Give gradients of one layer each of the U-Net and both encoders, as a network would get."""
    watched = [
        model.denoiser.get_submodule("up_blocks.0.attentions.0.proj_in"),
        *(
            next(m for n, m in encoder.named_modules() if n.endswith("layers.0.mlp.fc1"))
            for encoder in model.text_encoders
        ),
    ]
    weights = [layer.get_parameter("weight").requires_grad_() for layer in watched]
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    condition = {**model.encode_text(["a cat"]), **sizes}
    loss = model.predict(noisy, torch.tensor([9]), condition).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return [weight.grad for weight in weights if weight.grad is not None]


def test_gradient_checkpointing_changes_no_gradient(
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
    sizes: Callable[[int], dict[str, torch.Tensor]],
) -> None:
    expected = gradients(load_sdxl(tiny_file), sizes(1))
    assert len(expected) == 3
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    model = load_sdxl(tiny_file, gradient_checkpointing=True)
    runs = {"fc1": 0}
    layer = next(
        m for n, m in model.text_encoders[0].named_modules() if n.endswith("layers.0.mlp.fc1")
    )
    layer.register_forward_hook(lambda *_: runs.update(fc1=runs["fc1"] + 1))
    found = gradients(model, sizes(1))
    assert runs["fc1"] == 2
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_only_trained_encoders_recompute(
    tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    model = load_sdxl(tiny_file, "meta", gradient_checkpointing=True, text_encoder_lr1=0)
    te1, te2 = model.text_encoders
    assert not te1.training
    assert te2.training
    assert model.denoiser.is_gradient_checkpointing


def test_attention_paths_agree(
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
    sizes: Callable[[int], dict[str, torch.Tensor]],
) -> None:
    predictions = []
    for sdpa in (True, False):
        model = load_sdxl(tiny_file, sdpa=sdpa)
        attention = "sdpa" if sdpa else "eager"
        unet: Any = model.denoiser
        te1: Any = model.text_encoders[0]
        assert te1.config._attn_implementation == attention
        kinds = {type(p).__name__ for p in unet.attn_processors.values()}
        assert kinds == {"AttnProcessor2_0" if sdpa else "AttnProcessor"}
        with torch.no_grad():
            condition = {**model.encode_text(["a cat"]), **sizes(1)}
            noisy = torch.ones(1, 4, 8, 8)
            predictions.append(model.predict(noisy, torch.tensor([5]), condition))
    torch.testing.assert_close(predictions[0], predictions[1], rtol=1e-4, atol=1e-4)


def test_parts_say_rate_group_and_prefix(
    tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    model = load_sdxl(tiny_file, "meta", unet_lr=1e-4, text_encoder_lr=[0, 2e-5])
    assert [(p.name, p.group, p.prefix, p.lr) for p in model.parts] == [
        ("unet", "unet", "lora_unet", 1e-4),
        ("te2", "textencoder", "lora_te2", 2e-5),
    ]
    (frozen,) = model.frozen_parts
    assert (frozen.name, frozen.prefix) == ("te1", "lora_te1")
    assert frozen.title == "text encoder 1 (CLIP ViT-L/14)"
    assert model.parts[1].title == "text encoder 2 (OpenCLIP ViT-bigG/14)"


def test_every_layer_has_a_name_in_files(
    tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    for part in load_sdxl(tiny_file, "meta").parts:
        layers = {
            path
            for path, module in part.module.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        norms = {path for path in part.file_names if "norm" in path.rpartition(".")[2]}
        assert part.file_names.keys() - norms == layers
        assert len(set(part.file_names.values())) == len(part.file_names)
        assert not any("." in name for name in part.file_names.values())


def test_rates_without_effect_are_named(
    tiny_file: Path, run_config: Callable[..., RunConfig]
) -> None:
    model = Sdxl(
        pretrained_model_name_or_path=str(tiny_file),
        network_train_unet_only=True,
        text_encoder_lr=[1e-5],
    )
    (remark,) = model.remarks(run_config(model))
    assert remark == "--text_encoder_lr has no effect: --network_train_unet_only is set"


def test_released_encoders_are_freed(tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]) -> None:
    model = load_sdxl(tiny_file, network_train_unet_only=True)
    assert model.vae is not None
    alive = [weakref.ref(module) for module in (*model.text_encoders, model.vae)]
    model.release_text_encoders()
    model.release_image_encoder()
    gc.collect()
    assert [reference() for reference in alive] == [None, None, None]
    assert model.text_encoders == ()
    assert model.frozen_parts == ()
    assert [part.name for part in model.parts] == ["unet"]


def test_metadata_names_and_hashes_the_base(
    tiny_file: Path, tiny_folder: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    """Hashes by their definitions in reference 12.4."""
    content = tiny_file.read_bytes()
    hashes = {
        "hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
        "new": hashlib.sha256(content).hexdigest(),
    }
    metadata = load_sdxl(tiny_file, "meta", vae=str(tiny_file)).metadata()
    assert metadata == {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_sd_model_name": "tiny.safetensors",
        "ss_sd_model_hash": hashes["hash"],
        "ss_new_sd_model_hash": hashes["new"],
        "ss_vae_name": "tiny.safetensors",
        "ss_vae_hash": hashes["hash"],
        "ss_new_vae_hash": hashes["new"],
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "epsilon",
        "ss_zero_terminal_snr": "False",
    }
    of_folder = load_sdxl(tiny_folder, "meta").metadata()
    assert of_folder["ss_sd_model_name"] == "folder"
    assert not {"ss_sd_model_hash", "ss_vae_name"} & of_folder.keys()


def test_encoding_images_is_deterministic(
    tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    model = load_sdxl(tiny_file, vae_dtype="bf16")
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = model.encode_images(images)
        assert torch.equal(latents, model.encode_images(images))
    assert latents.dtype == torch.float32
    assert latents.shape == (1, 4, 8, 8)
