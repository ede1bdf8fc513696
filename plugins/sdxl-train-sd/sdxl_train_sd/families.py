"""What Stable Diffusion 1.x and 2.x are (Rombach et al. 2022). Light to import."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from sdxl_train.ldm import ClipEncoder, Family, TinyShape, UnetFacts, UnetLayout

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

TITLES: Final = {False: "Stable Diffusion 1.x", True: "Stable Diffusion 2.x"}
"""The families by whether they are of the second version."""

_CONTEXTS: Final = {
    768: TITLES[False],
    1024: TITLES[True],
    1280: "the SDXL refiner",
    2048: "SDXL",
}
_SDXL_ONLY: Final = re.compile(
    r"lora_te[12]_|text_encoder_2\.|clip_g\.|.*(label_emb|add_embedding)"
    # Its coarsest level is the third, and has ten transformer blocks.
    r"|lora_unet_(input_blocks_[78]_1|.*transformer_blocks_[1-9])"
)
_LAYOUT: Final = UnetLayout(layers_per_block=2, attention=(True, True, True, False))
_MODEL_TYPES: Final = {
    f"a {TITLES[False]} checkpoint": "sd1",
    f"a {TITLES[True]} checkpoint": "sd2",
    "an SDXL checkpoint": "sdxl",
}
_BLOCKS: Final = (
    *(f"input_{index}" for index in range(12)),
    "middle",
    *(f"output_{index}" for index in range(12)),
)


def _recognize(facts: UnetFacts) -> str:
    """Say what a U-Net belongs to."""
    if facts.pooled:
        if facts.context_width == 1024:
            return "an unCLIP checkpoint of Stable Diffusion 2.x, not the base model"
        if facts.context_width == 1280:
            return "the SDXL refiner, not the base model"
        return "an SDXL checkpoint"
    is_second = {768: False, 1024: True}.get(facts.context_width or 0, bool(facts.linear))
    return f"a {TITLES[is_second or facts.has('cond_stage_model.model.')]} checkpoint"


def _other_network(
    keys: Collection[str], metadata: Mapping[str, str], *, is_v2: bool
) -> str | None:
    """Say which family a network is for, where no width tells."""
    if any(_SDXL_ONLY.match(key) for key in keys):
        return "SDXL"
    said = {"True": True, "False": False}.get(metadata.get("ss_v2", ""), is_v2)
    return None if said == is_v2 else TITLES[said]


def _metadata(is_v: bool, *, is_v2: bool) -> dict[str, str]:
    """Give what sd-scripts writes of the base model, by whether it predicts velocity."""
    version = "v2" if is_v2 else "v1"
    resolution = "-768-v" if is_v else "-512"
    return {
        "ss_base_model_version": f"sd_{version}{'_v' if is_v else ''}",
        "ss_v2": str(is_v2),
        "modelspec.architecture": f"stable-diffusion-{version}{resolution if is_v2 else ''}/lora",
        "modelspec.implementation": "diffusers",
    }


SD1: Final = Family(
    title=TITLES[False],
    checkpoint=f"a {TITLES[False]} checkpoint",
    text_encoders=(
        ClipEncoder(
            name="te",
            title="text encoder (CLIP ViT-L/14)",
            folder="text_encoder",
            tokenizer="tokenizer",
            key="cond_stage_model.transformer.",
            naming="transformers",
            files={
                "kohya": "lora_te_",
                "diffusers": "text_encoder.",
                "comfy": "text_encoders.clip_l.transformer.",
            },
            cache_name="openai_clip-vit-large-patch14",
        ),
    ),
    layout=_LAYOUT,
    unet_naming="diffusers",
    blocks=_BLOCKS,
    recognize=_recognize,
    model_types=_MODEL_TYPES,
    other_network=partial(_other_network, is_v2=False),
    contexts=_CONTEXTS,
    latent_scaling=0.18215,
    usual_layer=1,
    final_norm=True,
    num_heads=8,
    pipeline="StableDiffusionPipeline",
    npz="_sd",
    pickles=True,
    metadata=partial(_metadata, is_v2=False),
)
"""Stable Diffusion 1.1 to 1.5."""

SD2: Final = replace(
    SD1,
    title=TITLES[True],
    checkpoint=f"a {TITLES[True]} checkpoint",
    text_encoders=(
        ClipEncoder(
            name="te",
            title="text encoder (OpenCLIP ViT-H/14)",
            folder="text_encoder",
            tokenizer="tokenizer",
            key="cond_stage_model.model.",
            naming="openclip",
            files={
                "kohya": "lora_te_",
                "diffusers": "text_encoder.",
                "comfy": "text_encoders.clip_h.transformer.",
            },
            padding="!",
            # It was trained on the states of the second-to-last layer, so the last one is nowhere.
            unused_layers=1,
            cache_name="stabilityai_stable-diffusion-2",
        ),
    ),
    other_network=partial(_other_network, is_v2=True),
    num_heads=None,
    metadata=partial(_metadata, is_v2=True),
)
"""Stable Diffusion 2.0 and 2.1, which predict noise (512) or velocity (768-v)."""

TINY1: Final = TinyShape(
    unet_widths=(16, 32, 64, 64),
    depths=(1, 1, 1, 1),
    text_encoders=((16, 3),),
    linear_projection=False,
)
TINY2: Final = TinyShape(
    unet_widths=(16, 32, 64, 64),
    depths=(1, 1, 1, 1),
    text_encoders=((24, 3),),
    linear_projection=True,
)
