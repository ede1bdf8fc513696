"""The full-size SDXL on the meta device: read from shapes, named as clients name it."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_lora_plugins.model import SDXL
from sdxl_train.ldm import VAE as VAE_KEY
from sdxl_train.ldm import checkpoint, names
from sdxl_train.ldm.configs import layout_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sdxl_train.ldm.loaded import LoadedLdm
    from sdxl_train.ldm.origins import Origin

# The published configurations of stable-diffusion-xl-base-1.0.
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "norm_num_groups": 32,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
TE1 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
TE2 = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.13025,
    "sample_size": 1024,
}


def stored_shapes(module: nn.Module, origins: Mapping[str, Origin]) -> dict[str, list[int]]:
    """Give the shapes that a file has for a module."""
    shapes: dict[str, list[int]] = {}
    for path, tensor in module.state_dict().items():
        origin, shape = origins[path], list(tensor.shape)
        if origin.third is not None:
            shape[0] *= 3
        shapes[origin.name] = shape[::-1] if origin.transposed else shape
    return shapes


@pytest.fixture(scope="module")
def full_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse file with the header of the full-size SDXL: 7 GB that take no room."""
    path = tmp_path_factory.mktemp("full") / "sdxl.safetensors"
    write_full_size(path, "F16")
    return path


def write_full_size(path: Path, dtype: str) -> None:
    """Write a sparse file with the header of the full-size SDXL, in a type of 16 bits."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        te1 = CLIPTextModel(CLIPTextConfig(**TE1))
        te2 = CLIPTextModelWithProjection(CLIPTextConfig(**TE2))
        vae = AutoencoderKL(**VAE)
    shapes = {
        **stored_shapes(unet, checkpoint.unet_origins(unet)),
        **stored_shapes(te1, checkpoint.clip_origins(te1, SDXL.encoder("te1"))),
        **stored_shapes(te2, checkpoint.clip_origins(te2, SDXL.encoder("te2"))),
        **{
            VAE_KEY + names.vae_to_ldm(path, 4): list(tensor.shape)
            for path, tensor in vae.state_dict().items()
        },
    }
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


@pytest.fixture(scope="module")
def full_model(full_file: Path, load_sdxl: Callable[..., LoadedLdm]) -> LoadedLdm:
    return load_sdxl(full_file, "meta", dtype=torch.bfloat16)


def test_configurations_are_read_off_shapes(full_model: LoadedLdm) -> None:
    assert full_model.vae is not None
    te1: Any
    te2: Any
    te1, te2 = full_model.text_encoders
    unet: Any = full_model.denoiser
    for config, expected in (
        (unet.config, UNET),
        (full_model.vae.config, VAE),
        (te1.config.to_dict(), TE1),
        (te2.config.to_dict(), TE2),
    ):
        assert {key: config[key] for key in expected} == expected
    assert full_model.latent_scale == 8


def test_full_size_unet_has_its_parameters(full_model: LoadedLdm) -> None:
    assert sum(p.numel() for p in full_model.denoiser.parameters()) == 2_567_463_684


def test_module_names_are_those_of_sd_scripts(
    full_model: LoadedLdm, golden: Callable[[str], Any]
) -> None:
    """LoRA targets of sd-scripts: linear layers and 1x1 convolutions of transformers and CLIP."""
    expected = golden("sdxl_module_names")
    named = {
        f"{part.prefix}_{name}": path
        for part in full_model.parts
        for path, name in part.file_names.items()
        if isinstance(part.module.get_submodule(path), nn.Linear | nn.Conv2d)
    }
    inside = (".attentions.", "self_attn.", "mlp.")
    assert {name for name, path in named.items() if any(i in path for i in inside)} == set(
        expected["linear"]
    )
    outside = {"conv_in", "conv_out", "text_projection"}
    stem = ("time_embedding", "add_embedding")
    assert {
        name for name, path in named.items() if path not in outside and not path.startswith(stem)
    } == set(expected["with_conv"])
    assert {
        "lora_unet_input_blocks_0_0",
        "lora_unet_out_2",
        "lora_unet_time_embed_0",
        "lora_unet_time_embed_2",
        "lora_unet_label_emb_0_0",
        "lora_unet_label_emb_0_2",
        "lora_te2_text_projection",
    } <= named.keys()


def test_unet_names_go_there_and_back(full_model: LoadedLdm) -> None:
    blocks = layout_of(full_model.denoiser.config).blocks()
    paths = list(full_model.denoiser.state_dict())
    sgm = [names.unet_to_sgm(path, blocks) for path in paths]
    assert len(set(sgm)) == len(paths)
    assert [names.sgm_to_unet(name, blocks) for name in sgm] == paths


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
    ],
)
def test_blocks_have_the_indices_that_clients_know(
    path: str, name: str, full_model: LoadedLdm
) -> None:
    """The cases that the interop report spells out."""
    blocks = layout_of(full_model.denoiser.config).blocks()
    assert names.unet_to_sgm(path, blocks) == name
    assert names.sgm_to_unet(name, blocks) == path
