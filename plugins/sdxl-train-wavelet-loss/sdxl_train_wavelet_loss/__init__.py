"""A loss for sdxl-train that weighs details by their scale and direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import Field, Loss, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from sdxl_train import LossFunction, NoiseSchedule


class WaveletLoss(Loss):
    """Weighted squares of the error's Haar wavelet coefficients.

    After Korkmaz, Tekalp & Dogan 2024, "Training Generative Image Super-Resolution Models by
    Wavelet-Domain Losses Enables Better Control of Artifacts" (CVPR, equation 3), with squares for
    absolute values. The transform is orthonormal: with all weights 1 the sum is that of ``l2``.
    Each coefficient stands where its pixels are, so that masks act as they do on other losses.
    """

    wavelet_levels: int = Field(1, ge=1, le=4, description="How often the coarse part is halved.")
    wavelet_coarse: float = Field(1.0, ge=0, description="Weight of what is left at the end.")
    wavelet_edges: float = Field(
        1.5, ge=0, description="Weight of horizontal and vertical details at each level."
    )
    wavelet_corners: float = Field(
        1.0, ge=0, description="Weight of diagonal details at each level."
    )

    def build(self, schedule: NoiseSchedule) -> LossFunction:
        """Build the loss by element."""
        edges, corners = self.wavelet_edges, self.wavelet_corners

        def weighted(error: Tensor, levels: int) -> Tensor:
            """Weigh the coefficients of an error [B, C, h, w]; what has no partner is coarse."""
            loss = self.wavelet_coarse * error.square()
            height, width = (side // 2 * 2 for side in error.shape[-2:])
            if levels == 0 or not height or not width:
                return loss
            a, b = error[..., 0:height:2, 0:width:2], error[..., 0:height:2, 1:width:2]
            c, d = error[..., 1:height:2, 0:width:2], error[..., 1:height:2, 1:width:2]
            loss[..., 0:height:2, 0:width:2] = weighted((a + b + c + d) / 2, levels - 1)
            loss[..., 0:height:2, 1:width:2] = edges * ((a - b + c - d) / 2).square()
            loss[..., 1:height:2, 0:width:2] = edges * ((a + b - c - d) / 2).square()
            loss[..., 1:height:2, 1:width:2] = corners * ((a - b - c + d) / 2).square()
            return loss

        return lambda prediction, target, timesteps: weighted(
            prediction - target, self.wavelet_levels
        )


@hookimpl
def register_losses() -> dict[str, type[Loss]]:
    """Give the loss by its name."""
    return {"wavelet": WaveletLoss}
