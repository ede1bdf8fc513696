"""Loading SDXL: every source gives the same model, and faults inside a file are named."""

from __future__ import annotations

import json
import logging
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file

from sdxl_lora_plugins.model import SDXL, TINY, Sdxl
from sdxl_train import UserError
from sdxl_train.ldm import hub
from sdxl_train.ldm.tiny import write_tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdxl_train import RunConfig
    from sdxl_train.ldm.loaded import LoadedLdm

CAPTIONS = ["a cat", "1girl, solo, (smile:1.2), it's a long caption with UPPER case"]


def predict(model: LoadedLdm, sizes: dict[str, torch.Tensor]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 64, 96, generator=generator) * 2 - 1
    with torch.no_grad():
        condition = {**model.encode_text(CAPTIONS), **sizes}
        return model.predict(model.encode_images(images), torch.tensor([3, 700]), condition)


def test_folder_and_single_file_predict_the_same(
    tiny_folder: Path,
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
    sizes: Callable[[int], dict[str, torch.Tensor]],
) -> None:
    of_folder = predict(load_sdxl(tiny_folder), sizes(2))
    of_file = predict(load_sdxl(tiny_file), sizes(2))
    assert of_folder.shape == (2, 4, 8, 12)
    assert of_folder.std() > 0.1
    torch.testing.assert_close(of_file, of_folder, rtol=0, atol=0)


def test_single_file_is_what_diffusers_converts(
    tiny_file: Path, tiny_folder: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    """Diffusers' own converters, written apart from ours, read the file as we do."""
    model = load_sdxl(tiny_file)
    stored = load_file(tiny_file)
    config: Any = model.denoiser.config
    unet = convert_ldm_unet_checkpoint(dict(stored), dict(config))
    assert unet.keys() == model.denoiser.state_dict().keys()
    assert model.vae is not None
    vae = convert_ldm_vae_checkpoint(dict(stored), dict(model.vae.config))
    prefix = "conditioner.embedders.1.model."
    te2 = convert_open_clip_checkpoint(model.text_encoders[1], dict(stored), prefix=prefix)
    # Its CLIP converter knows bigG's 1280 channels only where it splits q, k and v.
    te2 = {name: value for name, value in te2.items() if "self_attn" not in name}
    for module, converted in ((model.denoiser, unet), (model.vae, vae)):
        for name, value in module.state_dict().items():
            torch.testing.assert_close(value, converted[name].view_as(value), rtol=0, atol=0)
    for name, value in te2.items():
        torch.testing.assert_close(model.text_encoders[1].state_dict()[name], value)


@pytest.mark.parametrize("single_file", [True, False])
def test_meta_build_has_the_shapes_of_the_real_one(
    single_file: bool, tiny_file: Path, tiny_folder: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    path = tiny_file if single_file else tiny_folder
    real = load_sdxl(path, dtype=torch.bfloat16)
    meta = load_sdxl(path, "meta", dtype=torch.bfloat16)
    assert [part.name for part in meta.parts] == [part.name for part in real.parts]
    for planned, loaded in zip(meta.parts, real.parts, strict=True):
        assert planned.file_names == loaded.file_names
        shapes = {name: (p.shape, p.dtype) for name, p in loaded.module.named_parameters()}
        assert {n: (p.shape, p.dtype) for n, p in planned.module.named_parameters()} == shapes
        assert all(parameter.is_meta for parameter in planned.module.parameters())


def test_tiny_models_of_one_seed_are_alike(
    tmp_path: Path,
    tiny_file: Path,
) -> None:
    again = load_file(write_tiny(tmp_path / "a.safetensors", SDXL, TINY, seed=7, single_file=True))
    other = load_file(write_tiny(tmp_path / "b.safetensors", SDXL, TINY, seed=8, single_file=True))
    first = load_file(tiny_file)
    name = "model.diffusion_model.out.2.weight"
    assert all(torch.equal(again[key], first[key]) for key in first)
    assert not torch.equal(other[name], first[name])


def test_tiny_folder_is_a_pipeline(tiny_folder: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", width=64, height=64, num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("stored", [torch.float16, torch.float64, torch.float8_e4m3fn])
def test_any_storage_precision_is_cast(
    stored: torch.dtype,
    tiny_file: Path,
    tmp_path: Path,
    load_sdxl: Callable[..., LoadedLdm],
) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in load_file(tiny_file).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    model = load_sdxl(tmp_path / "x.safetensors", dtype=torch.bfloat16)
    assert model.vae is not None
    for module, dtype in (
        (model.denoiser, torch.bfloat16),
        (model.text_encoders[0], torch.bfloat16),
        (model.text_encoders[1], torch.bfloat16),
        (model.vae, torch.float32),
    ):
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not module.training
    name = "model.diffusion_model.out.2.weight"
    expected = tensors[name].to(torch.bfloat16)
    assert torch.equal(model.denoiser.state_dict()["conv_out.weight"], expected)


def test_half_variant_of_a_folder_is_found(
    tmp_path: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    folder = write_tiny(tmp_path / "half", SDXL, TINY, dtype=torch.float16)
    for weights in list(folder.rglob("*.safetensors")):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    model = load_sdxl(folder)
    assert {parameter.dtype for parameter in model.denoiser.parameters()} == {torch.float32}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_folder_is_the_same_model(
    tiny_folder: Path,
    tmp_path: Path,
    load_sdxl: Callable[..., LoadedLdm],
    variant: str | None,
) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="2MB", variant=variant)
    assert len(list((tmp_path / "shards" / "unet").glob("*-of-*.safetensors"))) > 1
    model, expected = load_sdxl(tmp_path / "shards"), load_sdxl(tiny_folder)
    for part, other in zip(
        (model.denoiser, *model.text_encoders),
        (expected.denoiser, *expected.text_encoders),
        strict=True,
    ):
        weights = other.state_dict()
        assert all(torch.equal(weights[k], v) for k, v in part.state_dict().items())


def test_unknown_tensors_of_a_folder_are_named(
    tiny_folder: Path,
    tmp_path: Path,
    load_sdxl: Callable[..., LoadedLdm],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "folder")
    file = folder / "text_encoder" / "model.safetensors"
    save_file({**load_file(file), "extra.a": torch.zeros(1)}, file)
    caplog.set_level(logging.WARNING, "sdxl_train")
    load_sdxl(folder)
    assert "text_encoder holds unknown tensors, which are not used: 1 tensor: extra.a" in (
        caplog.messages
    )


def test_missing_tensors_are_counted_and_named(
    tiny_file: Path, tmp_path: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    tensors = load_file(tiny_file)
    gone = sorted(name for name in tensors if "output_blocks.1.0." in name)
    save_file({k: v for k, v in tensors.items() if k not in gone}, tmp_path / "x.safetensors")
    for device in ("cpu", "meta"):
        with pytest.raises(UserError) as caught:
            load_sdxl(tmp_path / "x.safetensors", device)
        message = str(caught.value)
        assert f"the U-Net lacks {len(gone)} tensors" in message
        assert all(name in message for name in gone[:5])
        assert gone[5] not in message


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.out.2.weight",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
        "first_stage_model.encoder.conv_in.weight",
    ],
)
def test_any_missing_tensor_is_a_user_error(
    name: str, tiny_file: Path, tmp_path: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    tensors = load_file(tiny_file)
    del tensors[name]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError):
        load_sdxl(tmp_path / "x.safetensors", "meta")


def test_other_depths_and_shapes_are_refused(
    tiny_file: Path, tmp_path: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    """A distilled U-Net lacks whole transformer blocks; it must not load as if it were SDXL."""
    tensors = load_file(tiny_file)
    block = "output_blocks.1.1.transformer_blocks.1."
    save_file({k: v for k, v in tensors.items() if block not in k}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="1 transformer blocks"):
        load_sdxl(tmp_path / "a.safetensors", "meta")
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    save_file({**tensors, name: tensors[name][:5]}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=f"do not fit in 1 tensor: {name}"):
        load_sdxl(tmp_path / "b.safetensors", "meta")


def test_unknown_tensors_are_counted_once(
    tiny_file: Path,
    tmp_path: Path,
    load_sdxl: Callable[..., LoadedLdm],
    caplog: pytest.LogCaptureFixture,
) -> None:
    text_model = "conditioner.embedders.0.transformer.text_model."
    harmless = {
        f"{text_model}embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(1.0),
        "denoiser.sigmas": torch.zeros(3),
        "model_ema.decay": torch.tensor(0.0),
    }
    tensors = {**load_file(tiny_file), **harmless}
    save_file(tensors, tmp_path / "a.safetensors")
    caplog.set_level(logging.WARNING, "sdxl_lora_plugins")
    load_sdxl(tmp_path / "a.safetensors", "meta")
    assert caplog.records == []
    save_file({**tensors, "extra.a": torch.zeros(1), "extra.b": torch.zeros(1)}, tmp_path / "b")
    load_sdxl(tmp_path / "b", "meta")
    assert [record.getMessage() for record in caplog.records] == [
        "b holds unknown tensors, which are not used: 2 tensors: extra.a, extra.b"
    ]


def test_build_refuses_what_the_check_refuses(
    tmp_path: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"<html></html>")
    with pytest.raises(UserError, match="web page"):
        load_sdxl(tmp_path / "x.safetensors")


def test_vae_encodes_as_diffusers_does(
    tiny_folder: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    images = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae = AutoencoderKL.from_pretrained(tiny_folder / "vae")
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.mode() * vae.config["scaling_factor"]
        latents = load_sdxl(tiny_folder, dtype=torch.bfloat16).encode_images(images)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected)


@pytest.fixture
def other_vae(tmp_path: Path) -> dict[str, Path]:
    """The VAE of another seed in every form that ``--vae`` takes."""
    folder = write_tiny(tmp_path / "other", SDXL, TINY, seed=11)
    file = write_tiny(tmp_path / "other.safetensors", SDXL, TINY, seed=11, single_file=True)
    prefix = "first_stage_model."
    ldm = {k.removeprefix(prefix): v for k, v in load_file(file).items() if k.startswith(prefix)}
    save_file(ldm, tmp_path / "ldm.safetensors")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = load_file(weights)
    for new_name, old_name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        old = {name.replace(f".{new_name}.", f".{old_name}."): t for name, t in old.items()}
    old = {name.replace(".to_out.0.", ".proj_attn."): tensor for name, tensor in old.items()}
    save_file(old, tmp_path / "old.safetensors")
    return {
        "model folder": folder,
        "vae folder": folder / "vae",
        "checkpoint": file,
        "ldm": tmp_path / "ldm.safetensors",
        "diffusers": weights,
        "old diffusers": tmp_path / "old.safetensors",
    }


def test_replacement_vae_is_used_in_every_form(
    other_vae: dict[str, Path], tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        expected = load_sdxl(other_vae["model folder"]).encode_images(images)
        assert not torch.equal(load_sdxl(tiny_file).encode_images(images), expected)
        for path in other_vae.values():
            latents = load_sdxl(tiny_file, vae=str(path)).encode_images(images)
            torch.testing.assert_close(latents, expected)


def test_hub_id_is_read_from_the_local_cache(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    load_sdxl: Callable[..., LoadedLdm],
) -> None:
    commit = "0" * 40
    repo = tmp_path / "models--someone--tiny-sdxl"
    shutil.copytree(tiny_folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = load_sdxl("someone/tiny-sdxl", vae="someone/tiny-sdxl")
    expected = load_sdxl(tiny_folder).denoiser.state_dict()["conv_in.weight"]
    assert torch.equal(model.denoiser.state_dict()["conv_in.weight"], expected)
    assert model.metadata()["ss_sd_model_name"] == "someone/tiny-sdxl"
    assert model.metadata()["ss_vae_name"] == "someone/tiny-sdxl"
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        load_sdxl("someone/other")


def test_download_takes_one_variant_of_each_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        "model_index.json",
        "sd_xl_base_1.0.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/model.onnx",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
    ]
    asked: list[list[str]] = []

    def snapshot(repo: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo: files)
    subfolders = ["", "unet", "text_encoder"]
    assert hub.download("a/b", subfolders=subfolders, weights=True) == tmp_path
    assert "unet/*.json" in asked[0]
    assert asked[1] == [
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.fp16.safetensors",
    ]


def test_unreachable_hub_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo: str, *, allow_patterns: list[str]) -> str:
        raise FileNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match="no connection"):
        hub.download("a/b", subfolders=["unet"], weights=True)


def test_prediction_type_comes_from_the_model(
    tmp_path: Path,
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    tensors = load_file(tiny_file)
    marked = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file({**tensors, **marked}, tmp_path / "marker.safetensors")
    for stem, said in (("v", "v"), ("eps", "epsilon")):
        metadata = {"modelspec.prediction_type": said}
        save_file(tensors, tmp_path / f"{stem}.safetensors", metadata=metadata)
    folder = write_tiny(tmp_path / "folder", SDXL, TINY, prediction_type="v_prediction")
    assert load_sdxl(tiny_file, "meta").schedule.prediction_type == "epsilon"
    for name, where in (
        ("marker.safetensors", "its marker v_pred"),
        ("v.safetensors", "its metadata"),
        (folder.name, "its scheduler_config.json"),
    ):
        caplog.clear()
        model = load_sdxl(tmp_path / name, "meta")
        assert model.schedule.prediction_type == "v_prediction"
        assert f"the model predicts v_prediction ({where})" in caplog.messages
        assert model.schedule.zero_terminal_snr == name.startswith("marker")
        assert model.metadata()["modelspec.prediction_type"] == "v"
        assert model.metadata()["ss_zero_terminal_snr"] == str(name.startswith("marker"))


def test_options_win_over_what_the_model_says(
    tmp_path: Path, tiny_file: Path, run_config: Callable[..., RunConfig]
) -> None:
    marked = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    said_v, said_nothing = tmp_path / "v.safetensors", tiny_file
    save_file({**load_file(tiny_file), **marked}, said_v)

    def chosen(path: Path, **options: Any) -> tuple[str, bool, list[str]]:
        model = Sdxl(pretrained_model_name_or_path=str(path), **options)
        schedule = model.build("meta", torch.float32).schedule
        assert model.predicts() == schedule.prediction_type
        remarks = list(model.remarks(run_config(model)))
        return schedule.prediction_type, schedule.zero_terminal_snr, remarks

    assert chosen(said_v) == ("v_prediction", True, [])
    assert chosen(said_nothing) == ("epsilon", False, [])
    assert chosen(said_nothing, v_parameterization=True, zero_terminal_snr=True) == (
        "v_prediction",
        True,
        [],
    )
    prediction, zero, remarks = chosen(said_v, v_parameterization=False, zero_terminal_snr=False)
    assert (prediction, zero) == ("epsilon", False)
    assert "its marker v_pred says v_prediction" in remarks[0]
    assert "its marker ztsnr" in remarks[1]
    _, _, (remark,) = chosen(said_nothing, zero_terminal_snr=True)
    assert "--zero_terminal_snr is meant for models that predict velocity" in remark


def test_v_target_is_the_velocity(tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]) -> None:
    """v = sqrt(abar) noise - sqrt(1 - abar) x0, Salimans & Ho 2022, appendix D."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([10, 800])
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    abar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    model = load_sdxl(tiny_file, "meta", v_parameterization=True)
    model.schedule = model.schedule.scaled_linear(prediction_type="v_prediction")
    expected = abar.sqrt() * noise - (1 - abar).sqrt() * latents
    torch.testing.assert_close(model.target(latents, noise, timesteps), expected)


def test_folder_whose_part_lacks_tensors_is_refused(
    tiny_folder: Path, tmp_path: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    for part, gone in (
        ("unet", "conv_in.bias"),
        ("text_encoder", "text_model.final_layer_norm.bias"),
    ):
        folder = tmp_path / part
        shutil.copytree(tiny_folder, folder)
        (weights,) = (folder / part).glob("*.safetensors")
        tensors = load_file(weights)
        del tensors[gone]
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(UserError, match="lacks 1 tensor: "):
            load_sdxl(folder)


def test_scale_of_latents_is_that_of_the_folder(
    tiny_folder: Path, tmp_path: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    path = tmp_path / "model" / "vae" / "config.json"
    config = json.loads(path.read_text())
    assert config["scaling_factor"] == 0.13025
    path.write_text(json.dumps({**config, "scaling_factor": 0.5}))
    assert load_sdxl(tmp_path / "model", "meta").latent_scaling == 0.5


def test_schedule_has_its_numbers_where_weights_have_none(
    tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    planned, real = load_sdxl(tiny_file, "meta").schedule, load_sdxl(tiny_file).schedule
    assert torch.equal(planned.alphas_cumprod, real.alphas_cumprod)
