"""SDXL with made-up weights, for benchmarks: nothing is read or downloaded. Light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sdxl_lora_plugins.model import Sdxl
from sdxl_train import Field
from sdxl_train.ldm import Said

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import device, dtype

    from sdxl_lora_plugins.made_up_parts import MadeUpModel
    from sdxl_train import Problem, RunConfig


class MadeUpSdxl(Sdxl):
    """SDXL with random weights, made where they are used. Latents are noise, whatever the image.

    It costs what the real one costs, and learns nothing. The VAE has no weights, and text encoders
    have some only where they are adapted.
    """

    default: ClassVar[bool] = False

    pretrained_model_name_or_path: str = Field(
        "full", pattern="^(full|tiny)$", description="Its size: full or tiny."
    )

    def _source_problems(self, config: RunConfig) -> Iterator[Problem]:
        yield from ()

    def _said(self) -> Said:
        return Said()

    def build(self, device: device | str, dtype: dtype) -> MadeUpModel:
        """Make the model up, its frozen weights in ``dtype``."""
        import torch

        from sdxl_lora_plugins.made_up_parts import make_up

        return make_up(self, torch.device(device), dtype)
