"""Names of layers in the namings of files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from torch import nn

from sdxl_lora_plugins.model import SDXL
from sdxl_train.ldm import Layer, parse_layer

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdxl_train.ldm.loaded import Modules


@pytest.mark.parametrize("file", ["keys_lora_dim4_conv4", "keys_lycoris_lokr_full"])
def test_every_layer_that_peers_write_survives_every_naming(
    file: str, golden: Callable[[str], Any]
) -> None:
    names = {key.partition(".")[0] for key in golden(file)}

    assert len(names) == 788 + 264
    for name in names:
        found = parse_layer(name, SDXL)
        assert found is not None, name
        layer, naming = found
        assert (layer.kohya, naming) == (name, "kohya")
        assert parse_layer(layer.name("diffusers"), SDXL) == (layer, "diffusers")
        assert parse_layer(layer.name("omi"), SDXL) == (layer, "omi")


def test_diffusers_names_are_the_modules_of_diffusers(full_size_modules: Modules) -> None:
    for path, module in full_size_modules.unet.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)):
            continue
        found = parse_layer(f"unet.{path}", SDXL)
        assert found is not None, path
        assert found[0].diffusers_path == path
        assert found[0].name("diffusers") == f"unet.{path}"
        flat = parse_layer(f"lora_unet_{path.replace('.', '_')}", SDXL)
        assert flat in ((found[0], "kohya-diffusers"), (found[0], "kohya"))


def test_names_of_other_programs_mean_the_same_layer() -> None:
    attention = Layer("unet", "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0", SDXL)
    below = "attentions.0.transformer_blocks.0.attn1.to_out.0"
    projection = Layer("te1", "text_model.encoder.layers.0.self_attn.q_proj", SDXL)
    for name, layer in {
        f"base_model.model.down_blocks.1.{below}": attention,
        f"lycoris_down_blocks_1_{below.replace('.', '_')}": attention,
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0": attention,
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj": projection,
        "clip_l.text_model.encoder.layers.0.self_attn.q_proj": projection,
        # transformers 5.6 and later names the layers without the first word.
        "lora_te1_encoder_layers_0_self_attn_q_proj": projection,
        "text_encoder.encoder.layers.0.self_attn.q_proj": projection,
        "lora_te2_text_projection": Layer("te2", "text_projection", SDXL),
    }.items():
        found = parse_layer(name, SDXL)
        assert found is not None, name
        assert found[0] == layer


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_unet_down_blocks_3_resnets_0_conv1",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn3_to_q",
        "lora_unet_input_blocks_4_1",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te1_text_model_encoder_layers_0_self_attn_qkv",
        "lora_unet_double_blocks_0_img_attn_qkv",
        "proj_in",
    ],
)
def test_what_is_no_layer_of_sdxl_is_none(name: str) -> None:
    assert parse_layer(name, SDXL) is None
