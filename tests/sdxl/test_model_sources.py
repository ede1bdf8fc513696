"""What the component says about its sources before any weights are read."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from sdxl_lora_plugins.model import Sdxl
from sdxl_train.ldm.sources import locate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdxl_train import Problem, RunConfig

UNET = "model.diffusion_model."


def write_header_only(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Write a valid safetensors file of zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 1
        for length in shape:
            size *= length
        header[name] = {"dtype": "U8", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))
    return path


def sd_unet(
    context: int, extra: dict[str, tuple[int, ...]], *, channels: int = 4
) -> dict[str, tuple[int, ...]]:
    """Shapes that tell a Stable Diffusion U-Net: tiny but for the width of its text."""
    return {
        f"{UNET}input_blocks.0.0.weight": (2, channels, 3, 3),
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (2, context),
        **extra,
    }


OTHER_KINDS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "sd15": (
        sd_unet(768, {"cond_stage_model.transformer.text_model.embeddings.x": (1,)}),
        "Stable Diffusion 1.x",
    ),
    "sd2": (
        sd_unet(1024, {"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": (1,)}),
        "Stable Diffusion 2.x",
    ),
    "refiner": (
        sd_unet(
            1280,
            {
                f"{UNET}label_emb.0.0.weight": (2, 2560),
                "conditioner.embedders.0.model.ln_final.weight": (2,),
            },
        ),
        "SDXL refiner",
    ),
    "inpaint": (
        sd_unet(2048, {f"{UNET}label_emb.0.0.weight": (2, 2816)}, channels=9),
        "inpainting",
    ),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": (3, 2)}, "Flux"),
    "flux-in-comfy": ({f"{UNET}double_blocks.0.img_attn.qkv.weight": (3, 2)}, "Flux"),
    "sd3": ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (3, 2)}, "Stable Diffusion 3"),
    "lora": ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (4, 2)}, "LoRA"),
    "lokr": ({"lora_unet_input_blocks_4_1_proj_in.lokr_w1": (4, 2)}, "LoRA"),
    "vae": ({"decoder.conv_in.weight": (2, 4, 3, 3)}, "VAE alone"),
    "controlnet": ({"control_model.input_hint_block.0.weight": (1,)}, "ControlNet"),
    "text-encoder": ({"text_model.final_layer_norm.weight": (2,)}, "text encoder alone"),
    "something": ({"a.b": (1,)}, "no kind known here"),
    "nothing": ({}, "without tensors"),
}


@pytest.fixture
def problems(run_config: Callable[..., RunConfig]) -> Callable[..., list[Problem]]:
    def check(path: Path | str, **options: Any) -> list[Problem]:
        model = Sdxl(pretrained_model_name_or_path=str(path), **options)
        return list(model.check(run_config(model)))

    return check


def only(found: list[Problem]) -> str:
    assert len(found) == 1, found
    assert "\n" not in found[0].message
    return f"{found[0].place}: {found[0].message} -> {found[0].remedy}"


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_wrong_kind_of_file_is_named_in_one_line(
    kind: str, tmp_path: Path, problems: Callable[..., list[Problem]]
) -> None:
    shapes, expected = OTHER_KINDS[kind]
    path = write_header_only(tmp_path / f"{kind}.safetensors", shapes)
    text = only(problems(path))
    assert expected in text
    assert text.startswith("--pretrained_model_name_or_path: ")


BAD_BYTES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "html": (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "json": (b'{"error": "not found"}', "JSON"),
    "old-pickle": (pickle.dumps({"state_dict": [1, 2, 3]}, protocol=2), "pickle"),
    "noise": (bytes(range(7, 200)), "not a safetensors file"),
    "header-cut": (struct.pack("<Q", 5000) + b'{"a": {"dtype"', "truncated"),
    "header-damaged": (struct.pack("<Q", 12) + b'{"a": {"dtyp', "damaged"),
    "eight-bytes": (struct.pack("<Q", 40), "truncated"),
}


@pytest.mark.parametrize("fault", BAD_BYTES)
@pytest.mark.parametrize("option", ["pretrained_model_name_or_path", "vae"])
def test_bad_bytes_are_named_in_one_line(
    fault: str,
    option: str,
    tmp_path: Path,
    tiny_file: Path,
    problems: Callable[..., list[Problem]],
) -> None:
    content, expected = BAD_BYTES[fault]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    found = problems(path) if option != "vae" else problems(tiny_file, vae=str(path))
    text = only(found)
    assert expected in text
    assert text.startswith(f"--{option}: ")


def test_pickle_is_refused_and_never_run(
    tmp_path: Path, problems: Callable[..., list[Problem]]
) -> None:
    for name, expected in (("model.ckpt", "a pickle"), ("model.safetensors", "named .safetensors")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'false'\ntR.")
        text = only(problems(tmp_path / name))
        assert expected in text
        assert "convert it to .safetensors" in text


def test_truncated_file_is_found_by_its_declared_size(
    tiny_file: Path, tmp_path: Path, problems: Callable[..., list[Problem]]
) -> None:
    size = tiny_file.stat().st_size
    path = tmp_path / "cut.safetensors"
    path.write_bytes(tiny_file.read_bytes()[: size - 1000])
    text = only(problems(path))
    assert f"declares {size:,} bytes, the file has {size - 1000:,}" in text


def test_missing_path_suggests_the_nearest_name(
    tiny_file: Path, problems: Callable[..., list[Problem]]
) -> None:
    text = only(problems(tiny_file.with_name("tinny.safetensors")))
    assert "no file or folder" in text
    assert "'tiny.safetensors'?" in text


def test_folder_without_index_names_the_files_in_it(
    tiny_file: Path, tmp_path: Path, problems: Callable[..., list[Problem]]
) -> None:
    assert "without model_index.json" in only(problems(tmp_path))
    assert "tiny.safetensors" in only(problems(tiny_file.parent))


def test_missing_parts_name_what_supplies_them(
    tiny_file: Path, tmp_path: Path, problems: Callable[..., list[Problem]]
) -> None:
    tensors = load_file(tiny_file)
    for prefix, expected in (
        ("first_stage_model.", "without its VAE -> give one with --vae"),
        ("conditioner.embedders.0.", "without its text encoder 1"),
        ("conditioner.embedders.1.", "without its text encoder 2"),
    ):
        path = tmp_path / f"{prefix}safetensors"
        save_file({k: v for k, v in tensors.items() if not k.startswith(prefix)}, path)
        assert expected in only(problems(path))
    assert problems(tmp_path / "first_stage_model.safetensors", vae=str(tiny_file)) == []


@pytest.mark.parametrize(
    ("part", "expected"),
    [("vae", "--vae"), ("text_encoder_2", "no option supplies this part"), ("unet", "U-Net")],
)
def test_folder_without_a_part_names_it(
    part: str,
    expected: str,
    tiny_folder: Path,
    tmp_path: Path,
    problems: Callable[..., list[Problem]],
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    text = only(problems(tmp_path / "model"))
    assert f"{part}/config.json" in text
    assert expected in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"in_channels": 9}, "inpainting"),
        ({"addition_embed_type": None, "cross_attention_dim": 768}, "Stable Diffusion 1.x"),
        ({"addition_embed_type": None, "cross_attention_dim": 1024}, "Stable Diffusion 2.x"),
        ({"cross_attention_dim": 1280}, "refiner"),
    ],
)
def test_other_kinds_of_folder_are_named(
    changes: dict[str, Any],
    expected: str,
    tiny_folder: Path,
    tmp_path: Path,
    problems: Callable[..., list[Problem]],
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    assert expected in only(problems(tmp_path / "model"))


def test_folder_with_bad_weights_names_the_part(
    tiny_folder: Path, tmp_path: Path, problems: Callable[..., list[Problem]]
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "U-Net: diffusion_pytorch_model.safetensors is truncated" in only(
        problems(tmp_path / "model")
    )
    weights.unlink()
    assert "has no weights" in only(problems(tmp_path / "model"))
    weights.with_suffix(".bin").write_bytes(b"PK\x03\x04")
    assert "is a pickle" in only(problems(tmp_path / "model"))
    (tmp_path / "model" / "model_index.json").write_text("{")
    assert "not valid JSON" in only(problems(tmp_path / "model"))


def test_vae_of_another_family_is_refused(
    tiny_file: Path, tmp_path: Path, problems: Callable[..., list[Problem]]
) -> None:
    flux = write_header_only(tmp_path / "ae.safetensors", {"decoder.conv_in.weight": (2, 16, 3, 3)})
    assert "16 latent channels" in only(problems(tiny_file, vae=str(flux)))
    lora = write_header_only(tmp_path / "x.safetensors", {"lora_unet_x.lora_up.weight": (2, 2)})
    assert "LoRA" in only(problems(tiny_file, vae=str(lora)))
    assert "folder without a VAE" in only(problems(tiny_file, vae=str(tmp_path)))


def test_uncached_hub_id_offline_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problems: Callable[..., list[Problem]]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = only(problems("someone/some-model"))
    assert "not in the local cache" in text
    assert "HF_HUB_OFFLINE" in text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert problems("someone/some-model") == []


def test_misspelt_path_beside_a_folder_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("models/sdxl").kind == "missing"


def test_good_sources_have_no_problem(
    tiny_file: Path, tiny_folder: Path, problems: Callable[..., list[Problem]]
) -> None:
    assert problems(tiny_file) == []
    assert problems(tiny_folder, vae=str(tiny_folder)) == []
    assert problems(tiny_folder, vae=str(tiny_folder / "vae")) == []


def test_both_train_only_flags_are_a_problem(
    tiny_file: Path, problems: Callable[..., list[Problem]]
) -> None:
    flags = {"network_train_unet_only": True, "network_train_text_encoder_only": True}
    assert "network_train_text_encoder_only" in only(problems(tiny_file, **flags))


def test_half_vae_contradicts_no_half_vae(
    tiny_file: Path, problems: Callable[..., list[Problem]]
) -> None:
    assert problems(tiny_file, no_half_vae=True) == []
    assert "vae_dtype" in only(problems(tiny_file, no_half_vae=True, vae_dtype="bf16"))


@pytest.mark.parametrize(
    ("options", "learning_rate"),
    [
        ({"unet_lr": 0, "text_encoder_lr": [0]}, 1e-4),
        ({}, 0.0),
        ({"network_train_unet_only": True, "unet_lr": 0}, 1e-4),
        ({"network_train_text_encoder_only": True, "text_encoder_lr": [0.0, 0.0]}, 1e-4),
    ],
)
def test_nothing_to_train_is_a_problem(
    options: dict[str, Any],
    learning_rate: float,
    tiny_file: Path,
    run_config: Callable[..., RunConfig],
) -> None:
    model = Sdxl(pretrained_model_name_or_path=str(tiny_file), **options)
    text = only(list(model.check(run_config(model, learning_rate=learning_rate))))
    assert "nothing is left to train" in text
    assert "text_encoder_lr2" in text


def test_idle_part_at_learning_rate_0_is_a_problem(
    tiny_file: Path, run_config: Callable[..., RunConfig]
) -> None:
    model = Sdxl(pretrained_model_name_or_path=str(tiny_file), unet_lr=1e-4)
    text = only(list(model.check(run_config(model, learning_rate=0.0))))
    assert "text encoder 1 and text encoder 2" in text


def test_cached_text_of_trained_encoders_names_three_remedies(
    tiny_file: Path, run_config: Callable[..., RunConfig]
) -> None:
    path = str(tiny_file)
    model = Sdxl(pretrained_model_name_or_path=path)
    text = only(list(model.check(run_config(model, cache=True))))
    assert "--network_train_unet_only" in text
    assert "--text_encoder_lr 0" in text
    assert "drop cache_text_encoder_outputs" in text
    for remedy in ({"network_train_unet_only": True}, {"text_encoder_lr": [0]}):
        model = Sdxl(pretrained_model_name_or_path=path, **remedy)
        assert list(model.check(run_config(model, cache=True))) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"unet": None, "te1": None, "te2": None}),
        ({"unet_lr": 1e-4, "text_encoder_lr": [1e-5]}, {"unet": 1e-4, "te1": 1e-5, "te2": 1e-5}),
        ({"text_encoder_lr": [1e-5, 2e-5]}, {"unet": None, "te1": 1e-5, "te2": 2e-5}),
        (
            {"text_encoder_lr": [1e-5, 2e-5], "text_encoder_lr2": 3e-5},
            {"unet": None, "te1": 1e-5, "te2": 3e-5},
        ),
        ({"text_encoder_lr1": 1e-5}, {"unet": None, "te1": 1e-5, "te2": None}),
        ({"text_encoder_lr2": 0}, {"unet": None, "te1": None}),
        ({"network_train_unet_only": True, "text_encoder_lr": [1e-5]}, {"unet": None}),
        ({"network_train_text_encoder_only": True}, {"te1": None, "te2": None}),
    ],
)
def test_each_part_has_its_own_rate(
    options: dict[str, Any], expected: dict[str, float | None]
) -> None:
    assert Sdxl(pretrained_model_name_or_path="x", **options).rates() == expected


def test_checking_imports_no_torch(tiny_file: Path, tiny_folder: Path) -> None:
    code = f"""
import sys
from types import SimpleNamespace as Stand
from sdxl_lora_plugins.model import Sdxl
from sdxl_train.data.dataset_options import DatasetOptions
network = Stand(network_weights=None, base_weights=None)
config = Stand(optimizer=Stand(learning_rate=1), place=str, network=network,
               dataset=DatasetOptions())
for path in ({str(tiny_file)!r}, {str(tiny_folder)!r}):
    assert not list(Sdxl(pretrained_model_name_or_path=path, vae=path).check(config))
assert not [name for name in ("torch", "diffusers", "transformers") if name in sys.modules]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
