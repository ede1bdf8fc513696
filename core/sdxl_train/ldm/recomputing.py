"""Gradient checkpointing: which parts of a model compute again in the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sdxl_train.without_compiler import recompute

if TYPE_CHECKING:
    from collections.abc import Collection

    from diffusers import UNet2DConditionModel
    from torch import nn


def recompute_unet(unet: UNet2DConditionModel, levels: Collection[int] | None) -> None:
    """Recompute each resnet and transformer block of some levels in the backward pass.

    Args:
        unet: Its levels count from 0, the finest; the middle belongs to the coarsest.
        levels: Which ones; None: all.
    """
    unet.enable_gradient_checkpointing(recompute)
    if levels is None:
        return
    down, up = list(unet.down_blocks), list(unet.up_blocks)[::-1]
    for level, blocks in enumerate(zip(down, up, strict=True)):
        if level in levels:
            continue
        middle = [unet.mid_block] if level == len(down) - 1 else []
        for block in (*blocks, *middle):
            for module in block.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False


def recompute_encoder(encoder: nn.Module) -> None:
    """Recompute each layer of a text encoder (the protocol of GradientCheckpointingLayer).

    transformers does so in training mode only. CLIP has no dropout, so nothing else changes by it.
    """
    for module in encoder.modules():
        if hasattr(module, "gradient_checkpointing"):
            layer = cast("Any", module)
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = recompute
    encoder.train()
