"""Pictures that a model generates: what is asked for, who makes it, what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """A picture to generate.

    Attributes:
        prompt: What it should show.
        negative_prompt: What it should not show; may be empty.
        width: Pixels, a multiple of 8.
        height: Pixels, a multiple of 8.
        steps: Denoising steps.
        guidance_scale: Weight of the prompt against the negative one; up to 1 there is no guidance.
        seed: Of all randomness: the same request and weights give the same picture.
        sampler: A name that the family of the model knows.
        multiplier: How much of the network acts.
    """

    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    steps: int
    guidance_scale: float
    seed: int
    sampler: str
    multiplier: float = 1.0


class ImageSampler(Protocol):
    """Generates pictures with a loaded model and whatever network is attached to it."""

    decoder_bytes: int
    """Size of what it keeps in memory beyond the model that trains: the image decoder, in fp32."""

    def __call__(self, request: ImageRequest, text: Mapping[str, Tensor]) -> Tensor:
        """Generate a picture: fp32 [3, height, width] in [0, 1] on the CPU.

        ``text`` is what the model's ``encode_prompts`` gives for the prompt and the negative
        prompt, in this order. Draws from no global generator.
        """


@dataclass(frozen=True, kw_only=True)
class SampledImage:
    """A picture that was sampled while training, or why there is none.

    Attributes:
        request: What was asked for.
        index: Position of its prompt in the file of prompts, from 0.
        step: Optimizer steps done; 0 is before training.
        epoch: The epoch that is running, from 1; 0 before training.
        path: The PNG file; None if there is no picture.
        fault: What is wrong with the picture; None if nothing is.
    """

    request: ImageRequest
    index: int
    step: int
    epoch: int
    path: Path | None
    fault: str | None = None
