"""Fixed questions to a model, so that its answers can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdxl_train.testing.functions import normal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sdxl_train.protocols import Adapter, LoadedModel

CAPTIONS = ("a photo of a cat", "a small drawing, blue")


class Predictions:
    """A model, and what it is asked: two latents, captions and sizes, the same each time."""

    def __init__(self, model: LoadedModel, *, pixels: int) -> None:
        self.model = model
        self.pixels = pixels
        with torch.no_grad():
            self.latents = model.encode_images(
                normal(len(CAPTIONS), 3, pixels, pixels).clamp(-1.0, 1.0)
            )

    def on(self, model: LoadedModel) -> Predictions:
        """Give the same questions for another model of the same family."""
        return Predictions(model, pixels=self.pixels)

    def make(
        self,
        adapter: Adapter | None = None,
        *,
        timestep: int = 500,
        text: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Give the model's prediction [2, C, h, w], with the graph if gradients are on.

        Args:
            adapter: The network that is attached, to be told of the timesteps.
            timestep: Of both latents.
            text: The encoded captions, where the text encoders are gone.
        """
        model = self.model
        timesteps = torch.full((len(CAPTIONS),), timestep)
        size = torch.full((len(CAPTIONS), 2), self.pixels)
        if adapter is not None:
            adapter.prepare_step(timesteps)
        # The text encoders may be adapted too.
        text = model.encode_text(CAPTIONS) if text is None else text
        condition = {
            **text,
            "original_size": size,
            "crop_top_left": torch.zeros_like(size),
            "target_size": size,
        }
        noisy = normal(*self.latents.shape, seed=3)
        return model.predict(noisy, timesteps, condition)
