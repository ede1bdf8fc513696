"""What to say of a step whose loss or gradient is not finite: which images, and why perhaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sdxl_train.data.batches import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sdxl_train.loop import BatchLoss, StepBatches


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The images of a step that may be why it is not finite, by short names.

    Attributes:
        broken: Those whose latents are not finite.
        suspects: Those of batches whose loss is not finite.
    """

    broken: tuple[str, ...]
    suspects: tuple[str, ...]

    @classmethod
    def of(cls, losses: Sequence[BatchLoss], group: StepBatches) -> Findings:
        """Look at the batches of this process."""
        own = [
            (loss.mean, batch.keys, batch.latents)
            for loss, batch in zip(losses, group.batches, strict=True)
            if isinstance(batch, Batch) and batch.latents is not None
        ]
        return cls(
            broken=tuple(
                key
                for _, keys, latents in own
                for key, image in zip(keys, latents, strict=True)
                if not torch.isfinite(image).all()
            ),
            suspects=tuple(
                key for loss, keys, _ in own if not torch.isfinite(loss) for key in keys
            ),
        )


def diagnosis(
    losses: Tensor,
    grad_norm: Tensor | None,
    number: int,
    group: StepBatches,
    findings: Sequence[Findings],
    outcome: str,
) -> str:
    """Say what is not finite and in which images."""
    broken = [key for each in findings for key in each.broken]
    suspects = [key for each in findings for key in each.suspects]
    keys = broken or suspects or group.keys
    named = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    if broken:
        what = "the latents of some images are not finite"
        cause = "The VAE overflows on them (an fp16 VAE does): use a VAE that is sound in fp16, "
        cause += "or --no_half_vae"
    elif suspects:
        what = "the loss is not finite"
        cause = "Likely causes: a learning rate that is too high, or fp16 overflow in the model"
    else:
        what = "the gradient is not finite"
        cause = "Likely cause: a learning rate that is too high"
    figures = f"loss {losses.mean().item():g}"
    if grad_norm is not None:
        figures += f", gradient norm {grad_norm.item():g}"
    return f"step {number}: {what} ({figures}), so {outcome}. Images: {named}. {cause}"
