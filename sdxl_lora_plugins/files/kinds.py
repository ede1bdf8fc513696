"""Which other model a network is for, told from the names and widths of its tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_TRANSFORMER: Final = r"(lora_unet_|lora_transformer_|lycoris_|transformer\.|diffusion_model\.)"
_OTHER_MODELS: Final = (
    ("Flux", rf"{_TRANSFORMER}(double_blocks|single_blocks|single_transformer_blocks)"),
    ("Stable Diffusion 3", rf"{_TRANSFORMER}joint_blocks|lora_te3_|text_encoder_3\."),
    (
        "a transformer model (such as Stable Diffusion 3, Z-Image or a video model)",
        rf"{_TRANSFORMER}(blocks|layers|transformer_blocks)|lora_transformer_|transformer\.",
    ),
)
_SD_ONLY: Final = re.compile(
    r"lora_te_text_model_"
    r"|(lora_unet_|unet\.)((down_blocks.0|up_blocks.3).attentions|(down|up)_blocks.3)"
)
_CONTEXTS: Final = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "the SDXL refiner",
}


def other_model(
    keys: Collection[str], contexts: Collection[int], metadata: Mapping[str, str]
) -> str | None:
    """Tell which model other than SDXL's base a network is for; None where nothing says so.

    Args:
        keys: The names of its tensors.
        contexts: The widths of the text that its cross-attentions attend to.
        metadata: Only refines what names and widths say: it is often wrong.
    """
    for title, pattern in _OTHER_MODELS:
        if any(re.match(pattern, key) for key in keys):
            return title
    named = next((_CONTEXTS[width] for width in sorted(contexts) if width in _CONTEXTS), None)
    if named is None and any(_SD_ONLY.match(key) for key in keys):
        return f"Stable Diffusion {'2' if metadata.get('ss_v2') == 'True' else '1'}.x"
    return named
