"""What a LoRA changes: the loss on its training pictures, and what is drawn for a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from sdxl_lora_plugins.commands.demo_images import SIZE, ZOG
from sdxl_lora_plugins.commands.demo_model import condition, pixels
from sdxl_lora_plugins.model import Sdxl
from sdxl_lora_plugins.networks import Lora

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from sdxl_lora_plugins.commands.demo_images import Pictures
    from sdxl_train.ldm import LoadedLdm

RANK: Final = 16
"""Rank and alpha of the demo's LoRA."""

_PROMPTS: Final = (ZOG, "a red circle", "a green triangle", "a blue square")
_PICTURES_OF_EACH: Final = 4
_SAMPLER_STEPS: Final = 20
_TIMESTEPS: Final = range(50, 1000, 100)


@dataclass(frozen=True, kw_only=True)
class Showing:
    """What a model does: its loss on the zogs, and what it draws by prompt."""

    loss: float
    drawn: dict[str, Pictures]


@torch.no_grad()
def compare(base: Path, lora: Path, zogs: Pictures, *, seed: int) -> tuple[Showing, Showing]:
    """Show what the base model does, and then with the LoRA from its file, on the same noise."""
    options = Sdxl(pretrained_model_name_or_path=str(base), network_train_unet_only=True)
    model = options.build("cpu", torch.float32)
    scheduler = EulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")

    def show() -> Showing:
        return Showing(loss=_loss(model, zogs, seed), drawn=_draw(model, scheduler, seed))

    before = show()
    adapter = Lora(network_dim=RANK, network_alpha=RANK).build(model)
    adapter.load_state_dict(load_file(lora))
    return before, show()


def _loss(model: LoadedLdm, zogs: Pictures, seed: int) -> float:
    """Give the mean loss on pictures at fixed timesteps, with the noise of the seed."""
    generator = torch.Generator().manual_seed(seed)
    latents = model.encode_images(pixels(zogs))
    told = condition(model.encode_text([ZOG] * len(zogs)), len(zogs))
    losses = []
    for timestep in _TIMESTEPS:
        timesteps = torch.full((len(zogs),), timestep)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = model.schedule.add_noise(latents, noise, timesteps)
        predicted = model.predict(noisy, timesteps, told)
        losses.append(F.mse_loss(predicted, model.target(latents, noise, timesteps)))
    return torch.stack(losses).mean().item()


def _draw(model: LoadedLdm, scheduler: EulerDiscreteScheduler, seed: int) -> dict[str, Pictures]:
    """Draw each prompt several times, from the noise of the seed."""
    prompts = [prompt for prompt in _PROMPTS for _ in range(_PICTURES_OF_EACH)]
    told = condition(model.encode_text(prompts), len(prompts))
    scheduler.set_timesteps(_SAMPLER_STEPS)
    side = SIZE // model.latent_scale
    noise = torch.randn(
        _PICTURES_OF_EACH, 4, side, side, generator=torch.Generator().manual_seed(seed)
    )
    # Each prompt begins from the same noise, so that only the words differ.
    latents = noise.repeat(len(_PROMPTS), 1, 1, 1) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        predicted = model.predict(scaled, timestep.expand(len(prompts)), told)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
    assert model.vae is not None
    images = model.vae.decode(latents / model.latent_scaling, return_dict=False)[0]
    drawn = _pictures(images)
    return {
        prompt: drawn[first : first + _PICTURES_OF_EACH]
        for prompt, first in zip(_PROMPTS, range(0, len(prompts), _PICTURES_OF_EACH), strict=True)
    }


def _pictures(images: Tensor) -> Pictures:
    """Turn images [B, 3, H, W] in about [-1, 1] into pictures."""
    scaled = ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().permute(0, 2, 3, 1)
    return [Image.fromarray(array) for array in scaled.numpy().astype(np.uint8)]
