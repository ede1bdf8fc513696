"""Kinds of weight files, told from the names and shapes of their tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from sdxl_train.ldm.family import LATENT_CHANNELS, UNET, VAE, Family, UnetFacts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sdxl_train.ldm.headers import Shapes

VAE_ALONE: Final = "a VAE alone"

_ADAPTER_MARKS = (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w1_", ".lokr_w")


def kind_of(shapes: Shapes, family: Family) -> str:
    """Say what a file with these tensors is, as a noun phrase; a family's own word for its own."""
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
        return kind_of_unet(_facts_of_file(shapes), family)
    if _has(shapes, "input_blocks.", "down_blocks."):
        return "a U-Net alone"
    if _has(shapes, *(f"{prefix}decoder.conv_in." for prefix in ("", VAE))):
        return VAE_ALONE
    if _has(shapes, "text_model.", "transformer.resblocks.", "encoder.layers."):
        return "a text encoder alone"
    if _has(shapes, "emb_params", "clip_l", "clip_g"):
        return "a textual-inversion embedding"
    return f"of no kind known here ({len(shapes)} tensors, the first is {next(iter(shapes))!r})"


def kind_of_unet(facts: UnetFacts, family: Family) -> str:
    """Say which model a U-Net belongs to, as a noun phrase."""
    channels = facts.in_channels
    if channels != LATENT_CHANNELS:
        what = {9: "an inpainting model", 8: "an instruct-pix2pix model"}.get(channels, "a model")
        return f"{what} ({channels} input channels), not a text-to-image base model"
    return family.recognize(facts)


def facts_of_config(config: Mapping[str, Any]) -> UnetFacts:
    """Read the facts of a U-Net off its configuration in a diffusers folder."""
    return UnetFacts(
        in_channels=config.get("in_channels", LATENT_CHANNELS),
        context_width=config.get("cross_attention_dim"),
        pooled=config.get("addition_embed_type") == "text_time",
        linear=bool(config.get("use_linear_projection")),
    )


def missing_parts(shapes: Shapes, family: Family, *, vae_given: bool) -> Iterator[tuple[str, str]]:
    """Yield each part that a file of a family lacks, and what supplies it."""
    for encoder in family.text_encoders:
        if not _has(shapes, encoder.key):
            yield encoder.title, "use a complete checkpoint: no option supplies a text encoder"
    if not vae_given and not _has(shapes, VAE):
        yield "VAE", "give one with --vae"


def _facts_of_file(shapes: Shapes) -> UnetFacts:
    contexts = _matching(shapes, r".*\.1\.transformer_blocks\.0\.attn2\.to_k\.weight$")
    projections = _matching(shapes, r".*\.1\.proj_in\.weight$")
    stem = shapes.get(f"{UNET}input_blocks.0.0.weight", (0, LATENT_CHANNELS))
    return UnetFacts(
        in_channels=stem[1],
        context_width=contexts[0][1] if contexts else None,
        pooled=f"{UNET}label_emb.0.0.weight" in shapes,
        linear=all(len(shape) == 2 for shape in projections) if projections else None,
        names=tuple(shapes),
    )


def _matching(shapes: Shapes, pattern: str) -> list[tuple[int, ...]]:
    return [shape for name, shape in shapes.items() if re.match(pattern, name)]


def _has(shapes: Shapes, *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in shapes)
