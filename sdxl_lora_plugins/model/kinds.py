"""Kinds of weight files, told from the names and shapes of their tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_lora_plugins.model.headers import Shapes

UNET: Final = "model.diffusion_model."
TE1: Final = "conditioner.embedders.0.transformer.text_model."
TE2: Final = "conditioner.embedders.1.model."
VAE: Final = "first_stage_model."

SDXL: Final = "an SDXL base checkpoint"
VAE_ALONE: Final = "a VAE alone"

LATENT_CHANNELS: Final = 4

_ADAPTER_MARKS = (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w1_", ".lokr_w")


def kind_of(shapes: Shapes) -> str:
    """Say what a file with these tensors is, as a noun phrase."""
    if not shapes:
        return "a file without tensors"
    if any(mark in name for name in shapes for mark in _ADAPTER_MARKS):
        return "a LoRA or another network, not a base model"
    if _has(shapes, "double_blocks.0.", f"{UNET}double_blocks.0."):
        return "a Flux checkpoint"
    if _has(shapes, "joint_blocks.0.", f"{UNET}joint_blocks.0."):
        return "a Stable Diffusion 3 checkpoint"
    if _has(shapes, "control_model.", "input_hint_block.", "controlnet_cond_embedding."):
        return "a ControlNet"
    if _has(shapes, f"{UNET}input_blocks."):
        return _kind_of_unet(shapes)
    if _has(shapes, "input_blocks.", "down_blocks."):
        return "a U-Net alone"
    if _has(shapes, *(f"{prefix}decoder.conv_in." for prefix in ("", VAE))):
        return VAE_ALONE
    if _has(shapes, "text_model.", "transformer.resblocks.", "encoder.layers."):
        return "a text encoder alone"
    if _has(shapes, "emb_params", "clip_l", "clip_g"):
        return "a textual-inversion embedding"
    return f"of no kind known here ({len(shapes)} tensors, the first is {next(iter(shapes))!r})"


def missing_parts(shapes: Shapes, *, vae_given: bool) -> Iterator[tuple[str, str]]:
    """Yield each part that an SDXL file lacks, and what supplies it."""
    complete = "use a complete checkpoint: no option supplies a text encoder"
    if not _has(shapes, TE1):
        yield "text encoder 1 (CLIP ViT-L/14)", complete
    if not _has(shapes, TE2):
        yield "text encoder 2 (OpenCLIP ViT-bigG/14)", complete
    if not vae_given and not _has(shapes, VAE):
        yield "VAE", "give one with --vae"


def _kind_of_unet(shapes: Shapes) -> str:
    stem = shapes.get(f"{UNET}input_blocks.0.0.weight", (0, LATENT_CHANNELS))
    if stem[1] != LATENT_CHANNELS:
        what = {9: "an inpainting model", 8: "an instruct-pix2pix model"}.get(stem[1], "a model")
        return f"{what} ({stem[1]} input channels), not a text-to-image base model"
    if f"{UNET}label_emb.0.0.weight" not in shapes:
        return _kind_of_sd(shapes)
    # The refiner has the bigG encoder only, in the place where SDXL has CLIP-L.
    if _has(shapes, "conditioner.embedders.0.model.") or _context_width(shapes) == 1280:
        return "the SDXL refiner, not the base model"
    return SDXL


def _kind_of_sd(shapes: Shapes) -> str:
    if _has(shapes, "cond_stage_model.model.") or _context_width(shapes) == 1024:
        return "a Stable Diffusion 2.x checkpoint"
    return "a Stable Diffusion 1.x checkpoint"


def _context_width(shapes: Shapes) -> int | None:
    """Give the width of the text that the U-Net attends to."""
    suffix = ".1.transformer_blocks.0.attn2.to_k.weight"
    return next((shape[1] for name, shape in shapes.items() if name.endswith(suffix)), None)


def _has(shapes: Shapes, *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in shapes)
