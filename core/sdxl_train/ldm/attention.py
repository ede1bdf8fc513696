"""How the U-Net's attention is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    XFormersAttnProcessor,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

    from sdxl_train.ldm.memory import Attention

_LEAN: Final = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]
"""The kernels that compute attention in tiles (Dao et al. 2022, "FlashAttention")."""


class LeanProcessor(AttnProcessor2_0):  # type: ignore[misc]
    """torch's attention without its fallback, which makes the whole matrix of weights."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute attention; raises RuntimeError where no such kernel can."""
        with sdpa_kernel(_LEAN):
            output: Tensor = super().__call__(*args, **kwargs)
        return output


def set_attention(unet: UNet2DConditionModel, attention: Attention) -> None:
    """Choose how a U-Net computes attention."""
    processors = {
        "lean": LeanProcessor,
        "xformers": XFormersAttnProcessor,
        "sdpa": AttnProcessor2_0,
        "explicit": AttnProcessor,
    }
    unet.set_attn_processor(processors[attention]())
