"""Reading a model from a diffusers folder, each part from files of its own."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_train.ldm.checkpoint import vae_origins
from sdxl_train.ldm.headers import read_header
from sdxl_train.ldm.origins import Origin, clip_origin
from sdxl_train.ldm.sources import vae_folder, weight_files
from sdxl_train.ldm.unfilled import fill_position_ids, without_weights
from sdxl_train.ldm.unread import Reader, stamps_of
from sdxl_train.ldm.weight_files import WeightFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import nn

    from sdxl_train.ldm.family import ClipEncoder, Family
    from sdxl_train.ldm.headers import Shapes


class ModelFolder:
    """A diffusers folder of a model, or of a VAE alone.

    Args:
        path: The folder.
        family: What its model should be.
        device: Where the parts go; on ``meta`` only shapes are read.
        mapped: Map the files; see :class:`~sdxl_train.ldm.weight_files.WeightFiles`.
    """

    def __init__(self, path: Path, family: Family, device: torch.device, *, mapped: bool) -> None:
        self._path = path
        self._family = family
        self._device = device
        self._mapped = mapped

    def unet(self, dtype: torch.dtype) -> tuple[UNet2DConditionModel, Reader | None]:
        """Give the U-Net without weights."""
        folder = self._path / "unet"
        unet = _of_shapes(UNet2DConditionModel, folder, dtype)
        return unet, self._reader(unet, folder, "unet", _own_names(unet))

    def vae(self, dtype: torch.dtype) -> tuple[AutoencoderKL, Reader | None]:
        """Give the VAE without weights."""
        folder = vae_folder(self._path)
        assert folder is not None
        vae = _of_shapes(AutoencoderKL, folder, dtype)
        return vae, self._reader(vae, folder, "vae", partial(vae_origins, vae))

    def text_encoders(
        self, dtype: torch.dtype, attention: str
    ) -> list[tuple[nn.Module, Reader | None]]:
        """Give the text encoders without weights, with an attention of transformers'."""
        return [self._text_encoder(form, dtype, attention) for form in self._family.text_encoders]

    def _text_encoder(
        self, form: ClipEncoder, dtype: torch.dtype, attention: str
    ) -> tuple[nn.Module, Reader | None]:
        folder = self._path / form.folder
        config = CLIPTextConfig.from_pretrained(folder, attn_implementation=attention)
        kind = CLIPTextModelWithProjection if form.projects else CLIPTextModel
        with without_weights(dtype):
            encoder: nn.Module = kind(config)
        fill_position_ids(encoder, self._device)
        origins = partial(_clip_origins, encoder)
        return encoder, self._reader(encoder, folder, form.folder, origins)

    def _reader(
        self,
        module: nn.Module,
        folder: Path,
        part: str,
        origins: Callable[[Shapes], dict[str, Origin]],
    ) -> Reader | None:
        """Give what reads a part; a plan may be of a folder whose weights are not downloaded."""
        title, stem = self._family.folders[part]
        paths = weight_files(folder, stem)
        if self._device.type == "meta":
            there = bool(paths) and all(path.is_file() for path in paths)
            return Reader(files=tuple(paths), stamps=stamps_of(paths), read=None) if there else None
        headers = [read_header(file) for file in paths]
        files = WeightFiles(
            headers, place=str(folder), remedy="download it again", mapped=self._mapped
        )
        reader = files.reader(module, origins(files.shapes), self._device, title)
        files.warn_of_unused(folder.name)
        return reader


def _own_names(module: nn.Module) -> Callable[[Shapes], dict[str, Origin]]:
    return lambda _: {path: Origin(name=path) for path in module.state_dict()}


def _clip_origins(encoder: nn.Module, shapes: Shapes) -> dict[str, Origin]:
    return {path: clip_origin(path, "", shapes) for path in encoder.state_dict()}


def _of_shapes(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    with without_weights(dtype):
        return kind.from_config(kind.load_config(folder))
