"""SD 1.x and 2.x keep the contract of model families, and their files are what others read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from sdxl_train.ldm import Family, TinyShape, write_tiny
from sdxl_train.testing import ModelContract
from sdxl_train_sd import Sd1, Sd2
from sdxl_train_sd.families import SD1, SD2, TINY1, TINY2

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdxl_train.ldm import LoadedLdm

FAMILIES: dict[str, tuple[type[Sd1 | Sd2], Family, TinyShape]] = {
    "sd1": (Sd1, SD1, TINY1),
    "sd2": (Sd2, SD2, TINY2),
}
Write: TypeAlias = "Callable[..., Path]"


class TestSd1(ModelContract):
    component = Sd1


class TestSd2OfVelocity(ModelContract):
    component = Sd2
    options = {"v_parameterization": True, "network_train_unet_only": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Write the tiny model of a family once: a folder, or a file with this ending."""
    folder = tmp_path_factory.mktemp("tiny")

    def write(name: str, ending: str = "") -> Path:
        path = folder / f"{name}{ending}"
        if not path.exists():
            _, family, shape = FAMILIES[name]
            write_tiny(path, family, shape, seed=3, single_file=bool(ending))
        return path

    return write


def load(name: str, path: Path, device: str = "cpu", **options: Any) -> LoadedLdm:
    component, _, _ = FAMILIES[name]
    return component(pretrained_model_name_or_path=str(path), **options).build(
        device, torch.float32
    )


def weights(model: LoadedLdm) -> dict[str, torch.Tensor]:
    assert model.vae is not None
    parts = {"unet": model.denoiser, "te": model.text_encoders[0], "vae": model.vae}
    return {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_single_files_hold_what_the_folder_does(name: str, tiny: Write) -> None:
    folder = load(name, tiny(name))
    expected = weights(folder)
    for ending in (".safetensors", ".ckpt"):
        model = load(name, tiny(name, ending))
        found = weights(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
        assert model.latent_scaling == folder.latent_scaling == 0.18215
        encoders: Any = (model.text_encoders[0], folder.text_encoders[0])
        assert encoders[0].config.hidden_act == encoders[1].config.hidden_act
        unets: Any = (model.denoiser, folder.denoiser)
        assert [m.heads for m in unets[0].modules() if hasattr(m, "heads")] == [
            m.heads for m in unets[1].modules() if hasattr(m, "heads")
        ]


@pytest.mark.parametrize("name", FAMILIES)
def test_file_is_read_as_diffusers_reads_it(name: str, tiny: Write) -> None:
    """The conversions of diffusers' own single-file loader, which this program does not use."""
    model, stored = load(name, tiny(name)), load_file(tiny(name, ".safetensors"))
    unet: Any = model.denoiser
    assert model.vae is not None
    converted = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(dict(stored), dict(unet.config)),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(dict(stored), dict(model.vae.config)),
    }
    for part, module in (("unet", unet), ("vae", model.vae)):
        own = module.state_dict()
        assert converted[part].keys() == own.keys()
        for key, tensor in converted[part].items():
            assert torch.equal(tensor.reshape(own[key].shape), own[key]), key


def test_last_layer_of_openclip_is_not_used(tiny: Write) -> None:
    stored = load_file(tiny("sd2", ".safetensors"))
    blocks = {name.split(".")[4] for name in stored if ".resblocks." in name}
    encoder: Any = load("sd2", tiny("sd2", ".safetensors")).text_encoders[0]

    assert blocks == {"0", "1", "2", "3"}
    assert encoder.config.num_hidden_layers == 3


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("clip_skip", [None, 1, 2])
def test_text_is_that_of_the_chosen_layer_behind_the_last_norm(
    name: str, clip_skip: int | None, tiny: Write
) -> None:
    model = load(name, tiny(name), clip_skip=clip_skip)
    encoder: Any = CLIPTextModel.from_pretrained(tiny(name) / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(tiny(name) / "tokenizer")
    ids = tokenizer(["a cat", ""], padding="max_length", max_length=77, return_tensors="pt")
    output = encoder(ids.input_ids, output_hidden_states=True)
    expected = output.last_hidden_state
    if clip_skip == 2:
        expected = encoder.final_layer_norm(output.hidden_states[-2])

    assert torch.allclose(model.encode_text(["a cat", ""])["context"], expected, atol=1e-5)


def test_long_captions_are_read_in_chunks(tiny: Write) -> None:
    model = load("sd1", tiny("sd1"), max_token_length=225)
    short = load("sd1", tiny("sd1"))
    caption = "cat " * 100
    context = model.encode_text([caption])["context"]

    assert context.shape[1] == 3 * 75 + 2
    assert model.max_tokens == 225
    assert torch.allclose(context[:, :76], short.encode_text([caption])["context"][:, :76])


@pytest.mark.parametrize(
    ("name", "width", "layers", "adapted"),
    # sd-scripts logs 72 or 138 modules of the text encoder and 192 of the U-Net, 278 with
    # convolutions.
    [("sd1", 768, 12, 72), ("sd2", 1024, 23, 138)],
)
def test_full_size_layers_are_those_of_sd_scripts(
    name: str, width: int, layers: int, adapted: int, tiny: Write
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=width, use_linear_projection=name == "sd2")
    model = load(name, tiny(name), "meta")
    part = next(part for part in model.parts if part.name == "unet")
    classes = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    expected = {
        f"{path}.{inner}".replace(".", "_")
        for path, module in unet.named_modules()
        if type(module).__name__ in classes
        for inner, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    found = {
        file_name
        for path, file_name in part.file_names.items()
        if isinstance(part.module.get_submodule(path), nn.Linear | nn.Conv2d)
    }

    assert len(expected) == 278
    assert sum("attentions" in path for path in expected) == 192
    # The tiny model has the topology of the real one.
    assert expected <= found
    assert found - expected == {"conv_in", "conv_out", "time_embedding_linear_1"} | {
        "time_embedding_linear_2"
    }
    text = next(part for part in model.parts if part.name == "te")
    assert text.prefix == "lora_te"
    own = {name for name in text.file_names.values() if "attn" in name or "mlp" in name}
    assert len(own) * layers // 3 == adapted
    assert all(name.startswith("text_model_encoder_layers_") for name in own)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_those_of_sd_scripts(name: str, tiny: Write) -> None:
    """Its rule: 3 i + j behind the stem on the way down, behind the middle on the way up."""
    part = next(part for part in load(name, tiny(name), "meta").parts if part.name == "unet")
    names = list(part.blocks)

    assert len(names) == 25
    for block, paths in part.blocks.items():
        for path in paths:
            words = path.split(".")
            if words[0] == "mid_block":
                expected = 12
            elif words[0] == "conv_in":
                expected = 0
            else:
                within = 2 if "samplers" in words[2] else int(words[3])
                start = 1 if words[0] == "down_blocks" else 13
                expected = start + 3 * int(words[1]) + within
            assert names.index(block) == expected, path
    stem = {path for path in part.file_names if path.startswith(("time_", "conv_norm", "conv_out"))}
    inside = {path for paths in part.blocks.values() for path in paths}
    assert inside == part.file_names.keys() - stem


@pytest.mark.parametrize(
    ("name", "options", "version", "architecture"),
    [
        ("sd1", {}, "sd_v1", "stable-diffusion-v1/lora"),
        ("sd2", {}, "sd_v2", "stable-diffusion-v2-512/lora"),
        ("sd2", {"v_parameterization": True}, "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
    ],
)
def test_files_name_their_base_model(
    name: str, options: dict[str, Any], version: str, architecture: str, tiny: Write
) -> None:
    metadata = load(name, tiny(name), "meta", **options).metadata()

    assert metadata["ss_base_model_version"] == version
    assert metadata["ss_v2"] == str(name == "sd2")
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.implementation"] == "diffusers"


def test_checkpoint_that_could_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}, "hook": Path}, path)
    model = Sd1(pretrained_model_name_or_path=str(path))

    with pytest.raises(Exception, match="never unpickled"):
        model.build("meta", torch.float32)


def test_names_of_old_checkpoints_are_read(tiny: Write, tmp_path: Path) -> None:
    """Some merges lack ``text_model`` in the names of the text encoder."""
    path = tmp_path / "old.ckpt"
    stored = load_file(tiny("sd1", ".safetensors"))
    torch.save({name.replace(".text_model.", "."): t for name, t in stored.items()}, path)
    encoders = [load("sd1", p).text_encoders[0] for p in (path, tiny("sd1"))]

    assert isinstance(encoders[0], CLIPTextModel)
    for old, new in zip(encoders[0].parameters(), encoders[1].parameters(), strict=True):
        assert torch.equal(old, new)
