"""The base model SDXL: what it is, and the options that only it has. Light to import."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, ClassVar, Final

from sdxl_train import Field
from sdxl_train.ldm import ClipEncoder, Family, LdmModel, TinyShape, UnetFacts, UnetLayout

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from sdxl_train import RunConfig

__all__ = ["SDXL", "TINY", "Sdxl"]

_CHECKPOINT: Final = "an SDXL base checkpoint"
_REFINER_WIDTH: Final = 1280
_SD_ONLY: Final = re.compile(
    r"lora_te_text_model_"
    r"|(lora_unet_|unet\.)((down_blocks.0|up_blocks.3).attentions|(down|up)_blocks.3)"
)


def _recognize(facts: UnetFacts) -> str:
    """Say what a U-Net belongs to."""
    if facts.pooled:
        # The refiner has the bigG encoder only, in the place where SDXL has CLIP-L.
        is_refiner = facts.context_width == _REFINER_WIDTH
        if is_refiner or facts.has("conditioner.embedders.0.model."):
            return "the SDXL refiner, not the base model"
        return _CHECKPOINT
    is_second = {768: False, 1024: True}.get(facts.context_width or 0, bool(facts.linear))
    if is_second or facts.has("cond_stage_model.model."):
        return "a Stable Diffusion 2.x checkpoint"
    return "a Stable Diffusion 1.x checkpoint"


def _other_network(keys: Collection[str], metadata: Mapping[str, str]) -> str | None:
    """Say which family a network is for, where its names tell."""
    if any(_SD_ONLY.match(key) for key in keys):
        return f"Stable Diffusion {'2' if metadata.get('ss_v2') == 'True' else '1'}.x"
    return None


SDXL: Final = Family(
    title="SDXL",
    checkpoint=_CHECKPOINT,
    text_encoders=(
        ClipEncoder(
            name="te1",
            title="text encoder 1 (CLIP ViT-L/14)",
            folder="text_encoder",
            tokenizer="tokenizer",
            key="conditioner.embedders.0.transformer.",
            naming="transformers",
            files={
                "kohya": "lora_te1_",
                "diffusers": "text_encoder.",
                "omi": "clip_l.",
                "comfy": "text_encoders.clip_l.transformer.",
            },
            cache_name="openai_clip-vit-large-patch14",
        ),
        ClipEncoder(
            name="te2",
            title="text encoder 2 (OpenCLIP ViT-bigG/14)",
            folder="text_encoder_2",
            tokenizer="tokenizer_2",
            key="conditioner.embedders.1.model.",
            naming="openclip",
            files={
                "kohya": "lora_te2_",
                "diffusers": "text_encoder_2.",
                "omi": "clip_g.",
                "comfy": "text_encoders.clip_g.transformer.",
            },
            padding="!",
            projects=True,
            cache_name="laion_CLIP-ViT-bigG-14-laion2B-39B-b160k",
        ),
    ),
    layout=UnetLayout(layers_per_block=2, attention=(False, True, True)),
    unet_naming="ldm",
    blocks=(
        "time_embed",
        *(f"input_{index}" for index in range(9)),
        *(f"middle_{index}" for index in range(3)),
        *(f"output_{index}" for index in range(9)),
        "out",
    ),
    recognize=_recognize,
    model_types={
        "a Stable Diffusion 1.x checkpoint": "sd1",
        "a Stable Diffusion 2.x checkpoint": "sd2",
    },
    other_network=_other_network,
    contexts={
        768: "Stable Diffusion 1.x",
        1024: "Stable Diffusion 2.x",
        _REFINER_WIDTH: "the SDXL refiner",
        2048: "SDXL",
    },
    latent_scaling=0.13025,
    usual_layer=2,
    final_norm=False,
    pipeline="StableDiffusionXLPipeline",
    npz="_sdxl",
    metadata=lambda _is_v: {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    },
)
"""Stable Diffusion XL base 1.0 (Podell et al. 2023)."""

TINY: Final = TinyShape(
    unet_widths=(32, 64, 64),
    depths=(1, 1, 2),
    text_encoders=((16, 2), (24, 3)),
    linear_projection=True,
)


class Sdxl(LdmModel):
    """Stable Diffusion XL base 1.0 and its fine-tunes."""

    default: ClassVar[bool] = True
    family: ClassVar[Family] = SDXL
    tiny: ClassVar[TinyShape] = TINY
    bucket_multiple: ClassVar[int] = 32

    text_encoder_lr: list[Annotated[float, Field(ge=0)]] | None = Field(
        None,
        max_length=2,
        description="Rate of both text encoders, or one rate each. Default: learning_rate. 0: not "
        "adapted.",
    )
    text_encoder_lr1: float | None = Field(
        None, ge=0, description="Rate of text encoder 1 (CLIP ViT-L/14), over text_encoder_lr."
    )
    text_encoder_lr2: float | None = Field(
        None, ge=0, description="Rate of text encoder 2 (OpenCLIP bigG), over text_encoder_lr."
    )

    def text_rates(self) -> dict[str, float | None]:
        """Give the rate of each text encoder."""
        both: list[float] | list[None] = self.text_encoder_lr or [None]
        return {
            "te1": both[0] if self.text_encoder_lr1 is None else self.text_encoder_lr1,
            "te2": both[-1] if self.text_encoder_lr2 is None else self.text_encoder_lr2,
        }

    def remarks(self, config: RunConfig) -> Iterator[str]:
        """Yield what the options do that their user may not expect."""
        yield from super().remarks(config)
        if self.clip_skip not in (None, SDXL.usual_layer):
            yield (
                f"{config.place('clip_skip')} trains on layer {self.clip_skip} from the last of "
                "the text encoders; SDXL and its clients use the second to last, which is the "
                "default"
            )
