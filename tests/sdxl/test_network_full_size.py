"""LoRA on the full-size SDXL, on the meta device: keys, shapes and groups of sd-scripts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_lora_plugins.model import Sdxl
from sdxl_lora_plugins.model.loaded import LoadedSdxl, Modules, Origins
from sdxl_lora_plugins.networks import Lora
from sdxl_train.assembly import Assembly, assemble

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdxl_train import RunConfig

# The published configuration of stabilityai/stable-diffusion-xl-base-1.0.
UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TE1 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
TE2 = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}


@pytest.fixture(scope="module")
def modules() -> Modules:
    with torch.device("meta"):
        return Modules(
            unet=UNet2DConditionModel(**UNET),
            te1=CLIPTextModel(CLIPTextConfig(**TE1, num_attention_heads=12)),
            te2=CLIPTextModelWithProjection(
                CLIPTextConfig(**TE2, num_attention_heads=20, projection_dim=1280)
            ),
            vae=AutoencoderKL(block_out_channels=(32, 32, 32, 32), latent_channels=4),
            tokenizers=cast("Any", ()),
        )


@pytest.fixture
def attach(modules: Modules) -> Callable[..., Assembly]:
    """Assemble the full-size model and LoRA of rank 4 with these rates."""

    def assembled(learning_rate: float = 1e-3, **options: Any) -> Assembly:
        component = Sdxl(pretrained_model_name_or_path="sdxl", **options)

        def build(device: str, dtype: torch.dtype) -> LoadedSdxl:
            return LoadedSdxl(
                modules,
                rates=component.rates(),
                prediction_type="epsilon",
                num_chunks=1,
                latent_scaling=0.13025,
                origins=Origins(model=None, model_name="sdxl"),
                device=torch.device(device),
            )

        config: RunConfig | Any = SimpleNamespace(
            model=SimpleNamespace(build=build),
            network=Lora(network_dim=4),
            optimizer=SimpleNamespace(learning_rate=learning_rate),
            training=SimpleNamespace(mixed_precision="no"),
            place=lambda name: f"--{name}",
            name_of=lambda kind: "lora",
        )
        assembly = assemble(config, "meta", 0)
        assembly.adapter.detach()
        return assembly

    return assembled


def test_keys_shapes_and_alphas_equal_the_golden_file(
    attach: Callable[..., Assembly], golden: Callable[[str], Any]
) -> None:
    state = attach().adapter.state_dict()
    found = {name: {"shape": list(tensor.shape)} for name, tensor in state.items()}
    expected = golden("keys_lora_dim4")
    assert found == {name: {"shape": entry["shape"]} for name, entry in expected.items()}
    alphas = {name: t.item() for name, t in state.items() if name.endswith(".alpha")}
    assert alphas == {n: entry["value"] for n, entry in expected.items() if n.endswith(".alpha")}


def test_parts_have_the_known_numbers_of_modules(attach: Callable[..., Assembly]) -> None:
    parts = attach().parts
    assert {name: part.modules for name, part in parts.items()} == {
        "te1": 72,
        "te2": 192,
        "unet": 722,
    }
    # Parameters for each unit of rank, as counted on sd-scripts' network.
    assert {name: part.parameters // 4 for name, part in parts.items()} == {
        "te1": 165_888,
        "te2": 737_280,
        "unet": 2_659_840,
    }


def groups_of(assembly: Assembly) -> dict[str, tuple[float, int]]:
    return {group["name"]: (group["lr"], len(group["params"])) for group in assembly.groups}


def test_groups_equal_the_golden_ones(
    attach: Callable[..., Assembly], golden: Callable[[str], Any]
) -> None:
    checked = 0
    for row in golden("param_groups"):
        args = dict(row["args"])
        text = args.pop("text_encoder_lr")
        if row["module"] != "networks.lora" or args["learning_rate"] is None or text == []:
            continue
        if isinstance(text, list) and len(text) == 2:
            # The peer gives both encoders the first of the two rates; we honour both.
            continue
        if args.pop("train_te", True) is False:
            args["network_train_unet_only"] = True
        args.pop("train_unet", None)
        if set(args) - {"unet_lr", "learning_rate", "network_train_unet_only"}:
            # LoRA+ and rates by block.
            continue
        if text is not None:
            args["text_encoder_lr"] = text if isinstance(text, list) else [text]
        expected = {g["desc"]: (g["lr"], g["tensors"]) for g in row["groups"]}
        assert groups_of(attach(**args)) == expected
        checked += 1
    assert checked == 7


def test_two_text_encoder_rates_make_two_groups(attach: Callable[..., Assembly]) -> None:
    expected = {
        "unet": (2e-4, 1444),
        "textencoder te1": (5e-5, 144),
        "textencoder te2": (1e-5, 384),
    }
    assert groups_of(attach(unet_lr=2e-4, text_encoder_lr=[5e-5, 1e-5])) == expected
    rates = {"text_encoder_lr1": 5e-5, "text_encoder_lr2": 1e-5}
    assert groups_of(attach(unet_lr=2e-4, **rates)) == expected


def test_text_encoder_at_rate_0_has_no_keys(attach: Callable[..., Assembly]) -> None:
    assembly = attach(unet_lr=2e-4, text_encoder_lr=[0, 1e-5])
    assert groups_of(assembly) == {"unet": (2e-4, 1444), "textencoder": (1e-5, 384)}
    assert not [name for name in assembly.adapter.state_dict() if name.startswith("lora_te1")]
    assert assembly.parts["te1"].modules == 0
