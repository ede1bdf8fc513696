"""Compilation of a U-Net's repeated blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from sdxl_train.errors import UserError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from sdxl_train.ldm.memory import MemoryOptions

_SHAPES: Final = 256
"""Shapes for which a block may be compiled, as many as torch allows in all."""


def compile_blocks(unet: UNet2DConditionModel, options: MemoryOptions) -> None:
    """Let the repeated blocks be compiled at their first use, one of each kind for all.

    Raises:
        UserError: If there is no such compiler.
    """
    known = sorted(torch._dynamo.list_backends(exclude_tags=()))
    if options.dynamo_backend not in known:
        raise UserError.of(
            "--dynamo_backend",
            f"{options.dynamo_backend!r} is no compiler of this torch",
            f"choose one of {', '.join(known)}",
        )
    if not options.dynamo_use_dynamic:
        # After 8 shapes torch would leave what comes uncompiled, and say nothing.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
    unet.compile_repeated_blocks(
        backend=options.dynamo_backend,
        mode=None if options.dynamo_mode == "default" else options.dynamo_mode,
        dynamic=options.dynamo_use_dynamic,
    )
