"""Which other model a network is for, told from the names and widths of its tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from sdxl_train.ldm.family import Family

_TRANSFORMER: Final = r"(lora_unet_|lora_transformer_|lycoris_|transformer\.|diffusion_model\.)"
_OTHER_MODELS: Final = (
    ("Flux", rf"{_TRANSFORMER}(double_blocks|single_blocks|single_transformer_blocks)"),
    ("Stable Diffusion 3", rf"{_TRANSFORMER}joint_blocks|lora_te3_|text_encoder_3\."),
    (
        "a transformer model (such as Stable Diffusion 3, Z-Image or a video model)",
        rf"{_TRANSFORMER}(blocks|layers|transformer_blocks)|lora_transformer_|transformer\.",
    ),
)


def other_model(
    keys: Collection[str], contexts: Collection[int], metadata: Mapping[str, str], family: Family
) -> str | None:
    """Tell which model of another kind a network is for; None where nothing says so.

    Args:
        keys: The names of its tensors.
        contexts: The widths of the text that its cross-attentions attend to.
        metadata: Only refines what names and widths say: it is often wrong.
        family: What it should be for.
    """
    for title, pattern in _OTHER_MODELS:
        if any(re.match(pattern, key) for key in keys):
            return title
    named = next(
        (family.contexts[width] for width in sorted(contexts) if width in family.contexts), None
    )
    if named is None:
        return family.other_network(keys, metadata)
    return None if named == family.title else named
