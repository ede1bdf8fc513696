"""Reading a model from a single file: ``.safetensors``, or of a family that allows it ``.ckpt``.

Each part is first built without memory, on torch's meta device, from the shapes in the header.
Then every tensor goes from the memory-mapped file straight to the device and dtype that it is used
in and is assigned, so that there is never a second copy of the model. Text encoders and VAE wait
for that until they are needed.
"""

from __future__ import annotations

import logging
import re
from functools import partial
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load as load_tensors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_train.errors import UserError
from sdxl_train.ldm import configs, names
from sdxl_train.ldm.family import UNET, VAE
from sdxl_train.ldm.headers import PICKLED, BadFileError, Header, counted, read_header
from sdxl_train.ldm.origins import Origin, clip_origin, openclip_origin
from sdxl_train.ldm.unfilled import without_weights
from sdxl_train.ldm.unread import Reader, stamps_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from sdxl_train.ldm.family import ClipEncoder, Family
    from sdxl_train.ldm.headers import Shapes

_log = logging.getLogger(__name__)

_HARMLESS = re.compile(
    r"(.*\.)?(position_ids|logit_scale|sigmas|log_sigmas|sigma_(min|max)|v_pred|ztsnr)$"
    r"|(model\.)?(betas|alphas_cumprod.*|sqrt_.*|log_one_minus.*|posterior_.*|logvar)$"
    r"|model_ema\.|denoiser\.|first_stage_model\.loss\."
)
"""Names that carry no weight of these parts: buffers, schedules, markers, averaged copies."""


_PIECE = 1 << 27
"""Numbers that are read between two openings of a file."""


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
        mapped: Read tensor by tensor from the mapped file; else the whole file into memory first.
    """

    def __init__(
        self, path: Path, family: Family, device: torch.device, *, mapped: bool = True
    ) -> None:
        self.path = path
        self.family = family
        self._mapped = mapped
        self._device = device
        self._used: set[str] = set()
        try:
            self.header: Header = read_header(path, pickles=family.pickles)
        except BadFileError as error:
            raise self._error(error) from error
        self._stamps = stamps_of([path])

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """Load the U-Net."""
        config = self._configure(lambda shapes: configs.unet_config(shapes, self.family))
        with without_weights():
            unet = UNet2DConditionModel(**config)
        self._reader(unet, unet_origins(unet), "U-Net", dtype)()
        return unet

    def text_encoders(self, dtype: torch.dtype, attention: str) -> list[tuple[nn.Module, Reader]]:
        """Give the text encoders without weights, with an attention of transformers'."""
        return [
            self._text_encoder(encoder, dtype, attention) for encoder in self.family.text_encoders
        ]

    def _text_encoder(
        self, encoder: ClipEncoder, dtype: torch.dtype, attention: str
    ) -> tuple[nn.Module, Reader]:
        config = self._configure(lambda shapes: configs.clip_config(shapes, encoder))
        kind = CLIPTextModelWithProjection if encoder.projects else CLIPTextModel
        with without_weights():
            module: nn.Module = kind(CLIPTextConfig(**config, attn_implementation=attention))
        shapes = self.header.shapes
        origins = clip_origins(module, encoder, shapes)
        reader = self._reader(module, origins, encoder.short_title, dtype)
        if encoder.unused_layers:
            # The last layers and what follows them are left out on purpose.
            self._used.update(name for name in shapes if name.startswith(encoder.key))
        return module, reader

    def vae(self, dtype: torch.dtype) -> tuple[AutoencoderKL, Reader]:
        """Give the VAE without weights, of a whole checkpoint or a file of its own."""
        prefix = vae_prefix(self.header.shapes)
        config = self._configure(lambda shapes: configs.vae_config(shapes, self.family, prefix))
        with without_weights():
            vae = AutoencoderKL(**config)
        origins = vae_origins(vae, self.header.shapes)
        return vae, self._reader(vae, origins, "VAE", dtype)

    def warn_of_unused(self, *, vae_replaced: bool) -> None:
        """Log once how many tensors of the file belong to nothing that trains or is trained on."""
        left = [
            name
            for name in self.header.shapes
            if name not in self._used
            and not _HARMLESS.match(name)
            and not (vae_replaced and name.startswith(VAE))
        ]
        if left:
            _log.warning(
                "%s holds unknown tensors, which are not used: %s", self.path.name, counted(left)
            )

    def _configure(self, read: Callable[[Shapes], dict[str, Any]]) -> dict[str, Any]:
        try:
            return read(self.header.shapes)
        except BadFileError as error:
            raise self._error(error) from error

    def _error(self, error: BadFileError) -> UserError:
        return UserError.of(str(self.path), error.fault.message, error.fault.remedy)

    def _reader(
        self, module: nn.Module, origins: Mapping[str, Origin], title: str, dtype: torch.dtype
    ) -> Reader:
        """Give what reads a part on the meta device, whose tensors are all there."""
        self._check(module, origins, title)
        self._used.update(origin.name for origin in origins.values())
        return Reader(
            files=(self.path,),
            stamps=self._stamps,
            dtype=dtype,
            read=partial(self._fill, module, origins, dtype),
        )

    def _fill(self, module: nn.Module, origins: Mapping[str, Origin], dtype: torch.dtype) -> None:
        """Give a part on the meta device its weights."""
        state = {
            path: origin.take(stored).to(device=self._device, dtype=dtype).contiguous()
            for path, origin, stored in self._tensors(origins)
        }
        module.load_state_dict(state, assign=True)
        fill_position_ids(module, self._device)

    def _tensors(self, origins: Mapping[str, Origin]) -> Iterator[tuple[str, Origin, Tensor]]:
        """Yield each parameter's stored tensor, as a view of the file; on meta, its shape."""
        if self._device.type == "meta":
            for path, origin in origins.items():
                yield path, origin, torch.empty(self.header.shapes[origin.name], device="meta")
            return
        if self.path.suffix.lower() in PICKLED:
            from sdxl_train.ldm.pickled import read_tensors

            tensors = read_tensors(self.path)
            for path, origin in origins.items():
                yield path, origin, tensors[origin.name]
            return
        if not self._mapped:
            tensors = load_tensors(self.path.read_bytes())
            for path, origin in origins.items():
                yield path, origin, tensors[origin.name]
            return
        for some in _in_pieces(origins, self.header):
            # A file that is mapped anew gives back the pages of the tensors that were copied.
            with safe_open(self.path, framework="pt") as file:
                for path in some:
                    yield path, origins[path], file.get_tensor(origins[path].name)

    def _check(self, module: nn.Module, origins: Mapping[str, Origin], title: str) -> None:
        """Raise UserError for tensors that are missing or of another shape."""
        shapes = self.header.shapes
        if missing := sorted({o.name for o in origins.values()} - shapes.keys()):
            text = f"the {title} lacks {counted(missing)}"
            raise UserError.of(str(self.path), text, "use a complete checkpoint")
        wanted = module.state_dict()
        wrong = []
        for path, origin in origins.items():
            stored = torch.empty(shapes[origin.name], device="meta")
            if origin.take(stored).shape != wanted[path].shape:
                wrong.append(origin.name)
        if wrong:
            text = f"the {title} has shapes that do not fit in {counted(wrong)}"
            raise UserError.of(str(self.path), text, f"use {self.family.checkpoint}")


def _in_pieces(origins: Mapping[str, Origin], header: Header) -> Iterator[list[str]]:
    """Give the parameters in pieces of not much more than a quarter of a gigabyte."""
    piece: list[str] = []
    numbers = 0
    for path, origin in origins.items():
        piece.append(path)
        numbers += prod(header.shapes[origin.name])
        if numbers > _PIECE:
            yield piece
            piece, numbers = [], 0
    yield piece


def fill_position_ids(encoder: nn.Module, device: torch.device) -> None:
    """Put the one buffer that no file holds, the positions of CLIP's tokens, on the device."""
    for module in encoder.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, torch.Tensor):
            numbers = torch.arange(ids.shape[-1]).expand(1, -1) if ids.is_meta else ids
            module.position_ids = numbers.to(device)
