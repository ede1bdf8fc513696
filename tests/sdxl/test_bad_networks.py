"""Network files that cannot be used as they are: one line each. Numbers are demand.md's."""

from __future__ import annotations

import io
import json
import pickle
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save, save_file

from sdxl_lora_plugins.model import SDXL
from sdxl_train.ldm import BadFileError, NetworkFile

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LAYER = "lora_unet_input_blocks_4_1_proj_in"


def lora(name: str = LAYER, *, rank: int = 4, width: int = 8) -> dict[str, Tensor]:
    return {
        f"{name}.lora_down.weight": torch.ones(rank, width),
        f"{name}.lora_up.weight": torch.ones(width, rank),
        f"{name}.alpha": torch.tensor(2.0),
    }


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/tmp/must-not-be-written", "w"))


def _header(entries: Any) -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw


def _torch(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


WHOLE = save(lora())
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "62-empty": ("a.safetensors", b"", "is empty (0 bytes)"),
    "62-truncated": ("a.safetensors", WHOLE[:-5], "is truncated"),
    "62-header-cut": ("a.safetensors", WHOLE[:40], "is truncated"),
    "62-web-page": ("a.safetensors", b"<!DOCTYPE html><html>Log in</html>", "a web page"),
    "62-web-page-pt": ("a.pt", b"<html>Log in</html>", "a web page"),
    "62-lfs": ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "62-header-is-a-list": ("a.safetensors", _header([1]), "not a safetensors file"),
    "62-entry-is-a-number": ("a.safetensors", _header({"a": 1}), "damaged safetensors header"),
    "62-offsets-missing": (
        "a.safetensors",
        _header({"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}),
        "damaged safetensors header",
    ),
    "62-shape-beyond-its-bytes": (
        "a.safetensors",
        _header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}) + bytes(4),
        "the shape and the bytes of a do not fit",
    ),
    "63-pickle-of-code": ("a.ckpt", pickle.dumps({"a": _Payload()}), "never unpickled"),
    "63-pickle-of-code-pt": ("a.pt", pickle.dumps(_Payload(), protocol=2), "never unpickled"),
    "63-not-torch": ("a.pt", b"PK\x03\x04 nothing", "damaged"),
    "63-no-table": ("a.pt", _torch([1, 2]), "holds no table of tensors"),
    "64-ckpt-renamed": (
        "a.safetensors",
        pickle.dumps({"a": 1}, protocol=2),
        "a pickle named .safetensors",
    ),
    "64-safetensors-renamed": ("a.ckpt", WHOLE, "a safetensors file named .ckpt"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_file_that_is_no_network_is_named_in_one_line(case: str, tmp_path: Path) -> None:
    name, content, expected = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)

    with pytest.raises(BadFileError) as caught:
        NetworkFile.open(tmp_path / name, SDXL)

    message = caught.value.fault.message
    assert expected in message
    assert message.startswith(name)
    assert "\n" not in message


def test_absent_file_is_named_in_one_line_61(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.pt"):
        with pytest.raises(BadFileError, match=f"{name} cannot be read: No such file"):
            NetworkFile.open(tmp_path / name, SDXL)


OTHER_KINDS: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "65-checkpoint": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 4, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": torch.ones(2, 2),
        },
        {},
        "is an SDXL base checkpoint",
    ),
    "65-vae": ({"decoder.conv_in.weight": torch.ones(2, 4, 3, 3)}, {}, "is a VAE alone"),
    "65-embedding": ({"clip_l": torch.ones(1, 2)}, {}, "a textual-inversion embedding"),
    "65-nothing": ({}, {}, "a file without tensors"),
    "74-sd1-by-names": (
        lora("lora_unet_down_blocks_0_attentions_0_proj_in"),
        {},
        "a network for Stable Diffusion 1.x, not for SDXL",
    ),
    "74-sd2-by-metadata": (
        lora("lora_te_text_model_encoder_layers_0_mlp_fc1"),
        {"ss_v2": "True"},
        "a network for Stable Diffusion 2.x, not for SDXL",
    ),
    "74-sd1-by-width": (
        lora("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", width=768),
        {},
        "a network for Stable Diffusion 1.x, not for SDXL",
    ),
    "74-sd2-by-width": (
        lora("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", width=1024),
        {},
        "a network for Stable Diffusion 2.x, not for SDXL",
    ),
    "74-refiner": (
        lora("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v", width=1280),
        {},
        "a network for the SDXL refiner, not for SDXL",
    ),
    "74-flux-kohya": (lora("lora_unet_double_blocks_0_img_attn_qkv"), {}, "for Flux, not for SDXL"),
    "74-flux-diffusers": (
        {
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 8),
            "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(8, 4),
        },
        {},
        "for Flux, not for SDXL",
    ),
    "74-sd3": (
        lora("lora_unet_joint_blocks_0_x_block_attn_qkv"),
        {},
        "for Stable Diffusion 3, not for SDXL",
    ),
    "74-video-model": (lora("diffusion_model.blocks.0.self_attn.q"), {}, "a transformer model"),
}


@pytest.mark.parametrize("case", OTHER_KINDS)
def test_file_for_something_else_is_told_what_it_is(case: str, tmp_path: Path) -> None:
    tensors, metadata, expected = OTHER_KINDS[case]
    path = tmp_path / "a.safetensors"
    # The library writes broken JSON where both are empty.
    save_file(tensors, path, metadata or None)

    with pytest.raises(BadFileError) as caught:
        NetworkFile.open(path, SDXL)

    assert expected in caught.value.fault.message
    assert "\n" not in caught.value.fault.message


BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "78-up-missing": ({f"{LAYER}.lora_up.weight": torch.empty(0)}, "lora_up.weight is missing"),
    "78-ranks-differ": (
        {f"{LAYER}.lora_up.weight": torch.ones(8, 3)},
        "lora_up.weight [8, 3] and lora_down.weight [4, 8] do not fit together",
    ),
    "78-not-a-matrix": (
        {f"{LAYER}.lora_up.weight": torch.ones(8)},
        "lora_up.weight has shape [8], expected a matrix",
    ),
    "78-zero-size": (
        {f"{LAYER}.lora_up.weight": torch.ones(8, 0)},
        "lora_up.weight has no elements: its shape is [8, 0]",
    ),
    "78-alpha-of-two": (
        {f"{LAYER}.alpha": torch.ones(2)},
        "alpha has shape [2], expected one number",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_layer_is_named_in_one_line(case: str, tmp_path: Path) -> None:
    changed, expected = BROKEN[case]
    tensors = {**lora(), **changed, **lora("lora_unet_input_blocks_4_1_proj_out")}
    if case.endswith("missing"):
        del tensors[f"{LAYER}.lora_up.weight"]
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)

    (fault,) = NetworkFile.open(path, SDXL).faults()

    assert fault.message == f"a.safetensors: {LAYER}: {expected}"


def test_keys_of_no_layer_are_counted_and_named_77(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({**lora(), "lora_unet_what_ever.lora_up.weight": torch.ones(1, 1)}, path)

    (fault,) = NetworkFile.open(path, SDXL).faults()

    assert "1 tensor: lora_unet_what_ever.lora_up.weight" in fault.message


def test_one_layer_under_two_names_is_a_fault_75(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({**lora(), **lora("lora_unet_down_blocks_1_attentions_0_proj_in")}, path)

    found = NetworkFile.open(path, SDXL)

    assert "stands for the same tensor as" in next(found.faults()).message


def test_absent_alpha_is_said_76(tmp_path: Path) -> None:
    tensors = lora()
    del tensors[f"{LAYER}.alpha"]
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)

    found = NetworkFile.open(path, SDXL)

    assert not list(found.faults())
    assert list(found.warnings()) == [
        f"a.safetensors has no alpha for 1 layer: {LAYER}; the rank is taken for it"
    ]


@pytest.mark.parametrize(
    ("shape", "axis"), [((1, 8), "input"), ((6, 1), "output"), ((6,), "output")]
)
def test_axis_of_dora_is_told_by_its_shape_79(
    shape: tuple[int, ...], axis: str, tmp_path: Path
) -> None:
    tensors = lora()
    tensors[f"{LAYER}.lora_up.weight"] = torch.ones(6, 4)
    path = tmp_path / "a.safetensors"
    save_file({**tensors, f"{LAYER}.dora_scale": torch.ones(shape)}, path)

    assert NetworkFile.open(path, SDXL).modules[LAYER].dora_axis == axis


def test_norm_of_dora_that_fits_no_axis_is_a_fault_79(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({**lora(), f"{LAYER}.dora_scale": torch.ones(1, 5)}, path)

    (fault,) = NetworkFile.open(path, SDXL).faults()

    assert "dora_scale [1, 5] fits neither the inputs nor the outputs of [8, 8]" in fault.message


def test_metadata_that_is_no_json_is_ignored_and_said_80(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(lora(), path, {"ss_network_args": "{not json", "ss_tag_frequency": "{}"})

    found = NetworkFile.open(path, SDXL)

    assert not list(found.faults())
    assert list(found.warnings()) == [
        "a.safetensors: its metadata ss_network_args is not JSON and is ignored"
    ]
