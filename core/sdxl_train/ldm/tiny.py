"""Tiny random models: the topology and names of the real ones, a few megabytes.

For tests and the demo. The same seed gives the same weights, as a diffusers folder and as a single
file. Pictures made with it mean nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_train.ldm import checkpoint, names
from sdxl_train.ldm.configs import norm_groups, num_heads
from sdxl_train.ldm.family import LATENT_CHANNELS, VAE
from sdxl_train.ldm.headers import PICKLED
from sdxl_train.ldm.tokenizer import clip_tokenizer
from sdxl_train.ldm.unfilled import without_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from sdxl_train.ldm.family import ClipEncoder, Family, TinyShape
    from sdxl_train.ldm.origins import Origin
    from sdxl_train.schedule import PredictionType

_VAE_WIDTHS: Final = (8, 8, 16, 16)
_TIME_WIDTH: Final = 8
_VOCABULARY: Final = 49408


@dataclass(frozen=True, kw_only=True)
class BareParts:
    """The networks of a model, without its tokenizers."""

    unet: UNet2DConditionModel
    text_encoders: tuple[nn.Module, ...]
    vae: AutoencoderKL


def write_tiny(
    path: Path,
    family: Family,
    shape: TinyShape,
    *,
    seed: int = 0,
    single_file: bool = False,
    prediction_type: PredictionType = "epsilon",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a tiny model.

    Args:
        path: A new folder, or a new file: ``.safetensors``, or what torch writes.
        family: What it is.
        shape: How large it is.
        seed: Of the random weights.
        single_file: Whether to write one file in LDM naming instead of a diffusers folder.
        prediction_type: What the model says that it predicts.
        dtype: Precision of the stored weights.

    Returns:
        ``path``.
    """
    parts = _random_parts(family, shape, seed)
    if single_file:
        write_file(path, family, parts, prediction_type, dtype)
    else:
        _write_folder(path, family, parts, prediction_type, dtype)
    return path


def tiny_parts(family: Family, shape: TinyShape) -> BareParts:
    """Give the parts of a tiny model on the meta device."""
    with without_weights(torch.float32):
        unet = UNet2DConditionModel(**_unet_config(family, shape))
        encoders = tuple(
            (CLIPTextModelWithProjection if form.projects else CLIPTextModel)(
                _text_config(form, width, layers)
            )
            for form, (width, layers) in zip(family.text_encoders, shape.text_encoders, strict=True)
        )
        vae = AutoencoderKL(**_vae_config(family))
    return BareParts(unet=unet, text_encoders=encoders, vae=vae)


def _random_parts(family: Family, shape: TinyShape, seed: int) -> BareParts:
    parts = tiny_parts(family, shape)
    vae = parts.vae
    generator = torch.Generator().manual_seed(seed)
    for part in (parts.unet, *parts.text_encoders, vae):
        part.to_empty(device="cpu")
        _randomize(part, generator)
    with torch.no_grad():
        # As in the real VAE: latents have unit variance after scaling, not before.
        vae.quant_conv.weight.div_(family.latent_scaling)
        vae.post_quant_conv.weight.mul_(family.latent_scaling)
    return parts


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


def _unet_config(family: Family, shape: TinyShape) -> dict[str, Any]:
    attention = family.layout.attention
    widths = shape.unet_widths
    context = sum(width for width, _ in shape.text_encoders)
    config = {
        "sample_size": 16,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": widths,
        "layers_per_block": family.layout.layers_per_block,
        "down_block_types": [f"{'CrossAttn' if a else ''}DownBlock2D" for a in attention],
        "up_block_types": [f"{'CrossAttn' if a else ''}UpBlock2D" for a in reversed(attention)],
        "transformer_layers_per_block": shape.depths,
        "attention_head_dim": [family.num_heads or num_heads(width) for width in widths],
        "cross_attention_dim": context,
        "use_linear_projection": shape.linear_projection,
        "norm_num_groups": norm_groups(widths),
    }
    if not family.pooled:
        return config
    pooled = sum(
        width
        for form, (width, _) in zip(family.text_encoders, shape.text_encoders, strict=True)
        if form.projects
    )
    return {
        **config,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": _TIME_WIDTH,
        "projection_class_embeddings_input_dim": pooled + 6 * _TIME_WIDTH,
    }


def _text_config(form: ClipEncoder, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=num_heads(width),
        hidden_act="gelu" if form.naming == "openclip" else "quick_gelu",
        eos_token_id=_VOCABULARY - 1,
        bos_token_id=_VOCABULARY - 2,
    )


def _vae_config(family: Family) -> dict[str, Any]:
    levels = len(_VAE_WIDTHS)
    return {
        "sample_size": 64,
        "latent_channels": LATENT_CHANNELS,
        "block_out_channels": _VAE_WIDTHS,
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": norm_groups(_VAE_WIDTHS),
        "scaling_factor": family.latent_scaling,
    }


def _write_folder(
    path: Path,
    family: Family,
    parts: BareParts,
    prediction_type: PredictionType,
    dtype: torch.dtype,
) -> None:
    index: dict[str, object] = {
        "_class_name": family.pipeline,
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    if family.pooled:
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        index["requires_safety_checker"] = False
    for form, encoder in zip(family.text_encoders, parts.text_encoders, strict=True):
        config: Any = encoder.config
        config.save_pretrained(path / form.folder)
        state = {names.clip_path(name): t for name, t in encoder.state_dict().items()}
        _save(state, path / form.folder / "model.safetensors", dtype)
        padding = {"padding": form.padding} if form.padding else {}
        clip_tokenizer(**padding).save_pretrained(path / form.tokenizer)
        index[form.folder] = ["transformers", type(encoder).__name__]
        index[form.tokenizer] = ["transformers", "CLIPTokenizer"]
    for subfolder, module in (("unet", parts.unet), ("vae", parts.vae)):
        module.save_config(path / subfolder)
        stem = family.folders[subfolder][1]
        _save(module.state_dict(), path / subfolder / f"{stem}.safetensors", dtype)
        index[subfolder] = ["diffusers", type(module).__name__]
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
    _write_json(path / "model_index.json", index)


def write_file(
    path: Path,
    family: Family,
    parts: BareParts,
    prediction_type: PredictionType,
    dtype: torch.dtype,
) -> None:
    """Write the parts of a model as one file in LDM naming."""
    levels = len(parts.vae.config["block_out_channels"])
    tensors = _stored(parts.unet, checkpoint.unet_origins(parts.unet))
    for form, encoder in zip(family.text_encoders, parts.text_encoders, strict=True):
        stored = _stored(encoder, checkpoint.clip_origins(encoder, form))
        tensors |= stored | _unused(stored, form)
    tensors |= {
        VAE + names.vae_to_ldm(name, levels): _as_convolution(name, tensor)
        for name, tensor in parts.vae.state_dict().items()
    }
    # A marker that checkpoints of families told a pooled text have; others say it nowhere.
    if prediction_type == "v_prediction" and family.pooled:
        tensors["v_pred"] = torch.tensor([])
    _save(tensors, path, dtype)


def _unused(stored: Mapping[str, Tensor], form: ClipEncoder) -> dict[str, Tensor]:
    """Give the layers behind the last one that is used, which files have all the same."""
    blocks = f"{form.key}transformer.resblocks."
    used = {int(name.removeprefix(blocks).partition(".")[0]) for name in stored if blocks in name}
    return {
        name.replace(f"{blocks}0.", f"{blocks}{len(used) + extra}."): tensor.clone()
        for extra in range(form.unused_layers)
        for name, tensor in stored.items()
        if name.startswith(f"{blocks}0.")
    }


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
    if path.suffix in PICKLED:
        torch.save({"state_dict": contiguous}, path)
    else:
        save_file(contiguous, path, metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
