"""The parts of a model that networks adapt: their layers under the names of files, their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from torch import nn

from sdxl_train.ldm import configs, names
from sdxl_train.protocols import Part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffusers import UNet2DConditionModel

    from sdxl_train.ldm.family import ClipEncoder, Family

UNET_GROUP: Final = "unet"
TEXT_GROUP: Final = "textencoder"


def parts_of(
    family: Family,
    unet: UNet2DConditionModel,
    text_encoders: Sequence[nn.Module],
    rates: Mapping[str, float | None],
) -> tuple[Part, ...]:
    """Describe every part that a network could adapt.

    Args:
        family: What the model is.
        unet: Its U-Net.
        text_encoders: In the order of the family.
        rates: Learning rate by part for those that are adapted; None stands for the optimizer's.
    """
    ldm_names = configs.layout_of(unet.config).blocks()
    paths = {path: names.unet_to_sgm(path, ldm_names) for path in _layers(unet)}
    blocks: dict[str, list[str]] = {block: [] for block in family.blocks}
    for path, name in paths.items():
        if block := family.block_of(name):
            blocks[block].append(path)
    denoiser = Part(
        name="unet",
        title="U-Net",
        group=UNET_GROUP,
        prefix="lora_unet",
        module=unet,
        lr=rates.get("unet"),
        file_names={
            path: _underscored(name if family.unet_naming == "ldm" else path)
            for path, name in paths.items()
        },
        blocks=blocks,
    )
    encoders = zip(family.text_encoders, text_encoders, strict=True)
    return (denoiser, *(_text_part(form, encoder, rates) for form, encoder in encoders))


def _text_part(form: ClipEncoder, encoder: nn.Module, rates: Mapping[str, float | None]) -> Part:
    return Part(
        name=form.name,
        title=form.title,
        group=TEXT_GROUP,
        prefix=form.files["kohya"].removesuffix("_"),
        module=encoder,
        lr=rates.get(form.name),
        file_names={path: _underscored(names.clip_path(path)) for path in _layers(encoder)},
    )


def _layers(module: nn.Module) -> list[str]:
    """List the paths of the layers that a network can adapt."""
    kinds = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
    return [path for path, layer in module.named_modules() if isinstance(layer, kinds)]


def _underscored(name: str) -> str:
    return name.replace(".", "_")
