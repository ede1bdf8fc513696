"""Convolutions whose channels of a pixel lie side by side in memory: NHWC, not NCHW.

Kernels for tensor cores want them so; in the other layout each convolution turns its input over and
its output back. Transformers read an image by pixels too, so between them and convolutions nothing
is left to be turned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor


def use_channels_last(unet: UNet2DConditionModel) -> None:
    """Lay the convolutions' weights out so, and keep what they compute so."""
    unet.to(memory_format=torch.channels_last)
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            # Its own turns the image back into the other layout.
            module._get_output_for_continuous_inputs = _Output(module)


class _Output:
    """What a transformer does last: project, and see the pixels as an image again."""

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer

    def __call__(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        """Turn [B, h w, C] into an image [B, C, h, w] without moving it, and add the residual."""

        def image(pixels: Tensor) -> Tensor:
            return pixels.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)

        project = self._transformer.proj_out
        if self._transformer.use_linear_projection:
            return image(project(hidden_states)) + residual
        output: Tensor = project(image(hidden_states)) + residual
        return output
