"""The parts of a made-up SDXL: published configurations, random weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch

from sdxl_lora_plugins.model import SDXL, TINY
from sdxl_train.ldm import (
    LATENT_CHANNELS,
    BareParts,
    LoadedLdm,
    Modules,
    Origins,
    Said,
    fill_position_ids,
    lean_imports,
    load_tokenizers,
    made_ready,
    text_attention,
    tiny_parts,
)

with lean_imports():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from sdxl_lora_plugins.made_up import MadeUpSdxl

# As published with stable-diffusion-xl-base-1.0.
UNET: Final[dict[str, Any]] = {
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
TE1: Final[dict[str, Any]] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
TE2: Final[dict[str, Any]] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
VAE: Final[dict[str, Any]] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": LATENT_CHANNELS,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": SDXL.latent_scaling,
}

_DRAWN: Final = 1 << 22
"""Numbers that are drawn; weights are pieces of them, which is faster than drawing billions."""


def full_parts(attention: str) -> BareParts:
    """Give the parts of SDXL on the meta device."""
    with torch.device("meta"):
        return BareParts(
            unet=UNet2DConditionModel(**UNET),
            text_encoders=(
                CLIPTextModel(CLIPTextConfig(**TE1, attn_implementation=attention)),
                CLIPTextModelWithProjection(CLIPTextConfig(**TE2, attn_implementation=attention)),
            ),
            vae=AutoencoderKL(**VAE),
        )


def make_up(options: MadeUpSdxl, device: torch.device, dtype: torch.dtype) -> MadeUpModel:
    """Make up the model that the options ask for."""
    is_tiny = options.pretrained_model_name_or_path == "tiny"
    parts = tiny_parts(SDXL, TINY) if is_tiny else full_parts(text_attention(options))
    fill_in(parts.unet, device, dtype)
    adapts_text = options.rates().keys() != {"unet"}
    for encoder in parts.text_encoders:
        fill_in(encoder, device if adapts_text else torch.device("meta"), dtype)
    modules = Modules(
        unet=parts.unet,
        text_encoders=parts.text_encoders,
        vae=parts.vae,
        tokenizers=load_tokenizers(SDXL.text_encoders, None, None),
    )
    size = options.pretrained_model_name_or_path
    return made_ready(
        MadeUpModel,
        options,
        modules,
        Said(),
        Origins(model=None, model_name=f"made-up SDXL ({size})"),
        scaling=SDXL.latent_scaling,
        device=device,
    )


def fill_in(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module on the meta device random weights, where and as they are used.

    They keep activations near unit variance (LeCun et al. 1998, section 4.6).
    """
    drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    state = {}
    for name, parameter in module.state_dict().items():
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        state[name] = values
        if device.type == "meta":
            continue
        scale, mean = 1.0, 0.0
        if parameter.ndim == 1:
            scale, mean = 0.1, float(name.endswith("weight"))
        elif "embedding.weight" not in name:
            scale = 1 / math.sqrt(parameter[0].numel())
        for piece in torch.split(values.view(-1), _DRAWN):
            torch.mul(drawn[: len(piece)], scale, out=piece)
            if mean:
                piece.add_(mean)
    module.load_state_dict(state, assign=True)
    fill_position_ids(module, device)


def text_shapes(unet: Any, num_texts: int, max_tokens: int) -> dict[str, tuple[int, ...]]:
    """Give the shapes of what a U-Net is told of captions, as ``encode_text`` names it."""
    config = unet.config
    shapes: dict[str, tuple[int, ...]] = {
        "context": (num_texts, max_tokens + 2, config.cross_attention_dim)
    }
    if whole := config.projection_class_embeddings_input_dim:
        # Beside the pooled text there are six embedded sizes.
        shapes["pooled"] = (num_texts, whole - 6 * config.addition_time_embed_dim)
    return shapes


class MadeUpModel(LoadedLdm):
    """A made-up SDXL: latents are noise, as are encoded captions unless an encoder is adapted."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Give noise of the shape of the images' latents, fp32; the same each time."""
        b, _, height, width = images.shape
        scale = self.latent_scale
        return self._noise(b, LATENT_CHANNELS, height // scale, width // scale)

    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Encode captions, or give noise of the shape of their encodings."""
        if any(part.module in self.text_encoders for part in self.parts):
            return super().encode_text(captions)
        shapes = text_shapes(self.denoiser, len(captions), self.max_tokens)
        return {name: self._noise(*shape) for name, shape in shapes.items()}

    def _noise(self, *shape: int) -> Tensor:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise.to(self._device)

    def image_encoder_identity(self) -> dict[str, str]:
        """Say that there is no VAE."""
        return {"the VAE": "made up"}

    def text_encoders_identity(self) -> dict[str, str]:
        """Say that there are no text encoders."""
        return {"the text encoders": "made up"}

    def release_image_encoder(self) -> None:
        """Drop the VAE, which has no weights."""
        self._vae = None
