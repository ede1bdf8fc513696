"""A tiny random SDXL: the topology and names of the real one, a few megabytes.

For tests and the demo. The same seed gives the same weights, as a diffusers folder and as a single
file. Pictures made with it mean nothing.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_lora_plugins.model import checkpoint, kinds, names, sources
from sdxl_lora_plugins.model.configs import LATENT_SCALING, norm_groups, num_heads
from sdxl_lora_plugins.model.tokenizer import clip_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from sdxl_lora_plugins.model.origins import Origin
    from sdxl_train import PredictionType

_UNET_WIDTHS: Final = (32, 64, 64)
_VAE_WIDTHS: Final = (8, 8, 16, 16)
_TE1_WIDTH: Final = 16
_TE2_WIDTH: Final = 24
_TIME_WIDTH: Final = 8
_VOCABULARY: Final = 49408

Parts = tuple[UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection, AutoencoderKL]


def write_tiny_sdxl(
    path: Path,
    *,
    seed: int = 0,
    single_file: bool = False,
    prediction_type: PredictionType = "epsilon",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a tiny SDXL.

    Args:
        path: A new folder, or a new ``.safetensors`` file.
        seed: Of the random weights.
        single_file: Whether to write one file in SGM naming instead of a diffusers folder.
        prediction_type: What the model says that it predicts.
        dtype: Precision of the stored weights.

    Returns:
        ``path``.
    """
    parts = _random_parts(seed)
    if single_file:
        _write_file(path, parts, prediction_type, dtype)
    else:
        _write_folder(path, parts, prediction_type, dtype)
    return path


def tiny_parts() -> Parts:
    """Give the parts of a tiny SDXL on the meta device: U-Net, both text encoders, VAE."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**_unet_config())
        te1 = CLIPTextModel(_text_config(_TE1_WIDTH, layers=2, act="quick_gelu"))
        te2 = CLIPTextModelWithProjection(_text_config(_TE2_WIDTH, layers=3, act="gelu"))
        vae = AutoencoderKL(**_vae_config())
    return unet, te1, te2, vae


def _random_parts(seed: int) -> Parts:
    unet, te1, te2, vae = tiny_parts()
    generator = torch.Generator().manual_seed(seed)
    for part in (unet, te1, te2, vae):
        part.to_empty(device="cpu")
        _randomize(part, generator)
    with torch.no_grad():
        # As in the real VAE: latents have unit variance after scaling, not before.
        vae.quant_conv.weight.div_(LATENT_SCALING)
        vae.post_quant_conv.weight.mul_(LATENT_SCALING)
    return unet, te1, te2, vae


def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Fill in weights that keep activations near unit variance (LeCun et al. 1998, section 4.6)."""
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator)
            if "embedding.weight" in name:
                parameter.copy_(noise)
            elif parameter.ndim == 1:
                is_scale = name.endswith("weight")
                parameter.copy_(0.1 * noise + (1.0 if is_scale else 0.0))
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))


def _unet_config() -> dict[str, Any]:
    return {
        "sample_size": 16,
        "in_channels": kinds.LATENT_CHANNELS,
        "out_channels": kinds.LATENT_CHANNELS,
        "block_out_channels": _UNET_WIDTHS,
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": tuple(num_heads(width) for width in _UNET_WIDTHS),
        "cross_attention_dim": _TE1_WIDTH + _TE2_WIDTH,
        "use_linear_projection": True,
        "norm_num_groups": norm_groups(_UNET_WIDTHS),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": _TIME_WIDTH,
        "projection_class_embeddings_input_dim": _TE2_WIDTH + 6 * _TIME_WIDTH,
    }


def _text_config(width: int, *, layers: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=num_heads(width),
        hidden_act=act,
        eos_token_id=_VOCABULARY - 1,
        bos_token_id=_VOCABULARY - 2,
    )


def _vae_config() -> dict[str, Any]:
    levels = len(_VAE_WIDTHS)
    return {
        "sample_size": 64,
        "latent_channels": kinds.LATENT_CHANNELS,
        "block_out_channels": _VAE_WIDTHS,
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": norm_groups(_VAE_WIDTHS),
        "scaling_factor": LATENT_SCALING,
    }


def _write_folder(
    path: Path, parts: Parts, prediction_type: PredictionType, dtype: torch.dtype
) -> None:
    for subfolder, part in zip(sources.PARTS, parts, strict=True):
        folder = path / subfolder
        is_clip = subfolder.startswith("text")
        if is_clip:
            part.config.save_pretrained(folder)
        else:
            part.save_config(folder)
        state = {names.clip_path(n) if is_clip else n: t for n, t in part.state_dict().items()}
        _save(state, folder / f"{sources.PARTS[subfolder][1]}.safetensors", dtype)
    clip_tokenizer().save_pretrained(path / "tokenizer")
    clip_tokenizer("!").save_pretrained(path / "tokenizer_2")
    scheduler = {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    (path / "scheduler").mkdir()
    _write_json(path / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(path / "model_index.json", index)


def _write_file(
    path: Path, parts: Parts, prediction_type: PredictionType, dtype: torch.dtype
) -> None:
    unet, te1, te2, vae = parts
    levels = len(_VAE_WIDTHS)
    tensors = {
        **_stored(unet, checkpoint.unet_origins(unet)),
        **_stored(te1, checkpoint.clip_origins(te1)),
        **_stored(te2, checkpoint.openclip_origins(te2)),
        **{
            kinds.VAE + names.vae_to_ldm(name, levels): _as_convolution(name, tensor)
            for name, tensor in vae.state_dict().items()
        },
    }
    if prediction_type == "v_prediction":
        tensors["v_pred"] = torch.tensor([])
    _save(tensors, path, dtype)


def _stored(module: nn.Module, origins: Mapping[str, Origin]) -> dict[str, Tensor]:
    """Turn parameters into the tensors of a file: the inverse of reading them."""
    state = module.state_dict()
    pieces: dict[str, list[Tensor]] = {}
    # Query, key and value share a tensor, in this order.
    for path, origin in sorted(origins.items(), key=lambda item: item[1].third or 0):
        tensor = state[path].T if origin.transposed else state[path]
        pieces.setdefault(origin.name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in pieces.items()}


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    """Give the matrices of the VAE's attention as convolutions of one pixel, as LDM keeps them."""
    return tensor[..., None, None] if ".to_" in name and tensor.ndim == 2 else tensor


def _save(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    contiguous = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
