"""Masks of the loss: how much each place of an image counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def shrunk_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Average masks [B, 1, H, W] over the area of each latent: [B, 1, h, w]."""
    return F.interpolate(masks, size=tuple(size), mode="area")


def masked_mean(error: Tensor, masks: Tensor, *, normalize: bool) -> Tensor:
    """Give the mean loss of each sample with its places weighted.

    As in sd-scripts, ``mean(error * mask)``: a sample with a small mask counts less. Normalized,
    ``sum(error * mask) / sum(mask)`` over every element: the mean over the masked area. A mask that
    is 0 everywhere gives 0 in both.

    Args:
        error: fp32 [B, C, h, w].
        masks: [B, 1, H, W] in [0, 1], at least as large as the latents.
        normalize: Divide by the masked share.

    Returns:
        fp32 [B].
    """
    weights = shrunk_masks(masks.to(error.dtype), error.shape[-2:])
    each = (error * weights).mean(dim=(1, 2, 3))
    if not normalize:
        return each
    share = weights.mean(dim=(1, 2, 3))
    # Where the share is 0, so is the loss: divide by anything else.
    return each / share.masked_fill(share == 0, 1.0)
