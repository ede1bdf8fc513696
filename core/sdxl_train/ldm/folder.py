"""Reading a model from a diffusers folder, each part from files of its own."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_train.ldm.checkpoint import vae_origins
from sdxl_train.ldm.headers import read_header
from sdxl_train.ldm.origins import Origin, clip_origin
from sdxl_train.ldm.sources import weight_files
from sdxl_train.ldm.unfilled import fill_position_ids, without_weights
from sdxl_train.ldm.unread import Reader, stamps_of
from sdxl_train.ldm.weight_files import WeightFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import nn

    from sdxl_train.ldm.family import Family
    from sdxl_train.ldm.headers import Shapes


def unread_unet(
    folder: Path, family: Family, device: torch.device, dtype: torch.dtype
) -> tuple[UNet2DConditionModel, Reader | None]:
    """Give the U-Net of a model folder without weights."""
    unet = _of_shapes(UNet2DConditionModel, folder / "unet", dtype)
    return unet, _reader(unet, folder / "unet", family, "unet", device, _own_names(unet))


def unread_vae(
    folder: Path, family: Family, device: torch.device, dtype: torch.dtype
) -> tuple[AutoencoderKL, Reader | None]:
    """Give a VAE without weights, from its own folder."""
    vae = _of_shapes(AutoencoderKL, folder, dtype)
    return vae, _reader(vae, folder, family, "vae", device, partial(vae_origins, vae))


def unread_text_encoders(
    folder: Path, family: Family, device: torch.device, dtype: torch.dtype, attention: str
) -> list[tuple[nn.Module, Reader | None]]:
    """Give the text encoders of a model folder without weights."""
    found = []
    for form in family.text_encoders:
        own = folder / form.folder
        config = CLIPTextConfig.from_pretrained(own, attn_implementation=attention)
        kind = CLIPTextModelWithProjection if form.projects else CLIPTextModel
        with without_weights(dtype):
            encoder: nn.Module = kind(config)
        fill_position_ids(encoder, device)
        origins = partial(_clip_origins, encoder)
        found.append((encoder, _reader(encoder, own, family, form.folder, device, origins)))
    return found


def _reader(
    module: nn.Module,
    folder: Path,
    family: Family,
    part: str,
    device: torch.device,
    origins: Callable[[Shapes], dict[str, Origin]],
) -> Reader | None:
    """Give what reads a part; a plan may be of a folder whose weights are not downloaded."""
    title, stem = family.folders[part]
    paths = weight_files(folder, stem)
    if device.type == "meta":
        there = bool(paths) and all(path.is_file() for path in paths)
        return Reader(files=tuple(paths), stamps=stamps_of(paths), read=None) if there else None
    headers = [read_header(file) for file in paths]
    files = WeightFiles(headers, place=str(folder), remedy="download it again")
    reader = files.reader(module, origins(files.shapes), device, title)
    files.warn_of_unused(folder.name)
    return reader


def _own_names(module: nn.Module) -> Callable[[Shapes], dict[str, Origin]]:
    return lambda _: {path: Origin(name=path) for path in module.state_dict()}


def _clip_origins(encoder: nn.Module, shapes: Shapes) -> dict[str, Origin]:
    return {path: clip_origin(path, "", shapes) for path in encoder.state_dict()}


def _of_shapes(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    with without_weights(dtype):
        return kind.from_config(kind.load_config(folder))
