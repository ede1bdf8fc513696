"""Reading a model from a single file: ``.safetensors``, or of a family that allows it ``.ckpt``.

Each part is first built without memory, on torch's meta device, from the shapes in the header.
Then every tensor goes from the memory-mapped file straight to the device and dtype that it is used
in and is assigned, so that there is never a second copy of the model. Each part waits for that
until it is needed.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_train.errors import UserError
from sdxl_train.ldm import configs, names
from sdxl_train.ldm.family import UNET, VAE
from sdxl_train.ldm.headers import BadFileError, Header, read_header
from sdxl_train.ldm.origins import Origin, clip_origin, openclip_origin
from sdxl_train.ldm.unfilled import fill_position_ids, without_weights
from sdxl_train.ldm.weight_files import WeightFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch
    from torch import nn

    from sdxl_train.ldm.family import ClipEncoder, Family
    from sdxl_train.ldm.headers import Shapes
    from sdxl_train.ldm.unread import Reader


def unet_origins(unet: UNet2DConditionModel) -> dict[str, Origin]:
    """Map every parameter of diffusers' U-Net to its tensor in LDM naming."""
    blocks = configs.layout_of(unet.config).blocks()
    return {path: Origin(name=UNET + names.unet_to_sgm(path, blocks)) for path in unet.state_dict()}


def clip_origins(
    module: nn.Module, encoder: ClipEncoder, shapes: Shapes = MappingProxyType({})
) -> dict[str, Origin]:
    """Map every parameter of a text encoder to its tensor in a file of these shapes."""
    if encoder.naming == "openclip":
        return {path: openclip_origin(path, encoder.key) for path in module.state_dict()}
    return {path: clip_origin(path, encoder.key, shapes) for path in module.state_dict()}


def vae_origins(vae: AutoencoderKL, shapes: Shapes) -> dict[str, Origin]:
    """Map every parameter of diffusers' VAE to its tensor in a file, whichever naming it has."""
    prefix = vae_prefix(shapes)
    num_levels = len(vae.config["block_out_channels"])
    origins = {}
    for path in vae.state_dict():
        candidates = [
            names.vae_to_ldm(path, num_levels),
            path,
            names.vae_to_old_diffusers(path),
        ]
        known = [name for name in candidates if prefix + name in shapes]
        origins[path] = Origin(name=prefix + (known or candidates)[0], flattened=".to_" in path)
    return origins


def vae_prefix(shapes: Shapes) -> str:
    """Give what stands before the names of a VAE in a file."""
    return VAE if any(name.startswith(VAE) for name in shapes) else ""


class Checkpoint:
    """A single file, and which of its tensors were used.

    Args:
        path: The file.
        family: What its model should be.
        device: Where the parts go; on ``meta`` only shapes are read.
        mapped: Map the file; see :class:`~sdxl_train.ldm.weight_files.WeightFiles`.
    """

    def __init__(self, path: Path, family: Family, device: torch.device, *, mapped: bool) -> None:
        self.path = path
        self.family = family
        self._device = device
        try:
            self.header: Header = read_header(path, pickles=family.pickles)
        except BadFileError as error:
            raise self._error(error) from error
        remedy = f"use {family.checkpoint}"
        self._files = WeightFiles([self.header], place=str(path), remedy=remedy, mapped=mapped)

    def unet(self, dtype: torch.dtype) -> tuple[UNet2DConditionModel, Reader | None]:
        """Give the U-Net without weights."""
        config = self._configure(lambda shapes: configs.unet_config(shapes, self.family))
        with without_weights(dtype):
            unet = UNet2DConditionModel(**config)
        return unet, self._reader(unet, unet_origins(unet), "U-Net")

    def text_encoders(
        self, dtype: torch.dtype, attention: str
    ) -> list[tuple[nn.Module, Reader | None]]:
        """Give the text encoders without weights, with an attention of transformers'."""
        return [
            self._text_encoder(encoder, dtype, attention) for encoder in self.family.text_encoders
        ]

    def _text_encoder(
        self, encoder: ClipEncoder, dtype: torch.dtype, attention: str
    ) -> tuple[nn.Module, Reader | None]:
        config = self._configure(lambda shapes: configs.clip_config(shapes, encoder))
        kind = CLIPTextModelWithProjection if encoder.projects else CLIPTextModel
        with without_weights(dtype):
            module: nn.Module = kind(CLIPTextConfig(**config, attn_implementation=attention))
        fill_position_ids(module, self._device)
        shapes = self.header.shapes
        reader = self._reader(module, clip_origins(module, encoder, shapes), encoder.short_title)
        if encoder.unused_layers:
            # The last layers and what follows them are left out on purpose.
            self._files.leave_out(lambda name: name.startswith(encoder.key))
        return module, reader

    def vae(self, dtype: torch.dtype) -> tuple[AutoencoderKL, Reader | None]:
        """Give the VAE without weights, of a whole checkpoint or a file of its own."""
        prefix = vae_prefix(self.header.shapes)
        config = self._configure(lambda shapes: configs.vae_config(shapes, self.family, prefix))
        with without_weights(dtype):
            vae = AutoencoderKL(**config)
        return vae, self._reader(vae, vae_origins(vae, self.header.shapes), "VAE")

    def warn_of_unused(self, *, vae_replaced: bool) -> None:
        """Log once how many tensors of the file belong to nothing that trains or is trained on."""
        if vae_replaced:
            self._files.leave_out(lambda name: name.startswith(VAE))
        self._files.warn_of_unused(self.path.name)

    def _configure(self, read: Callable[[Shapes], dict[str, Any]]) -> dict[str, Any]:
        try:
            return read(self.header.shapes)
        except BadFileError as error:
            raise self._error(error) from error

    def _error(self, error: BadFileError) -> UserError:
        return UserError.of(str(self.path), error.fault.message, error.fault.remedy)

    def _reader(
        self, module: nn.Module, origins: Mapping[str, Origin], title: str
    ) -> Reader | None:
        """Give what reads a part on the meta device, whose tensors are all there."""
        return self._files.reader(module, origins, self._device, title)
