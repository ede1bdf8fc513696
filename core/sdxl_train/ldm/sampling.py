"""Pictures with the live network, by diffusers' own pipeline and schedulers."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from torch import nn

from sdxl_train.ldm.samplers import SAMPLERS
from sdxl_train.libraries import quiet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from sdxl_train.ldm.loaded import LoadedLdm
    from sdxl_train.pictures import ImageRequest
    from sdxl_train.schedule import NoiseSchedule

_SMALLEST_SIGNAL: Final = 2.0**-24
"""Stands for no signal at all, at which the noise level would be infinite; fp16 can hold it."""

_UNWANTED: Final = ("add_watermarker", "requires_safety_checker")
"""What pipelines add of themselves."""


class KarrasEulerAncestralScheduler(EulerAncestralDiscreteScheduler):  # type: ignore[misc]
    """Euler ancestral at the noise levels of Karras et al. 2022, which diffusers' own lacks."""

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Take the noise levels of the plain Euler scheduler, which has Karras's."""
        super().set_timesteps(num_inference_steps, device)
        euler = EulerDiscreteScheduler.from_config(self.config, use_karras_sigmas=True)
        euler.set_timesteps(num_inference_steps, device=device)
        self.sigmas, self.timesteps = euler.sigmas, euler.timesteps


def make_scheduler(name: str, schedule: NoiseSchedule) -> Any:
    """Make the scheduler of a sampler for a noise schedule and what the model predicts on it.

    Timesteps are spaced as in published configurations; with zero terminal SNR they start at
    the last one (Lin et al. 2024, section 3.3).
    """
    sampler = SAMPLERS[name]  # type: ignore[index]
    kind = {KarrasEulerAncestralScheduler.__name__: KarrasEulerAncestralScheduler}.get(
        sampler.scheduler
    ) or getattr(diffusers, sampler.scheduler)
    signal = schedule.alphas_cumprod.double().cpu()
    ends_in_noise = signal[-1].item() < _SMALLEST_SIGNAL
    signal = signal.clamp_min(_SMALLEST_SIGNAL)
    before = torch.cat([torch.ones(1, dtype=signal.dtype), signal[:-1]])
    spacing = {
        "timestep_spacing": "trailing" if ends_in_noise else "leading",
        "steps_offset": 1,
    }
    return kind(
        num_train_timesteps=schedule.num_timesteps,
        trained_betas=(1 - signal / before).tolist(),
        prediction_type=schedule.prediction_type,
        **(spacing if sampler.takes_spacing else {}),
        **sampler.options,
    )


class LdmSampler:
    """Generates pictures with a model; implements ``sdxl_train.ImageSampler``.

    It keeps the VAE when the model releases it. Between pictures the VAE stays where it is found:
    on the device while images are encoded there, else in main memory.
    """

    def __init__(self, model: LoadedLdm, vae: AutoencoderKL) -> None:
        self.model = model
        self.vae = vae
        self.decoder_bytes = sum(p.numel() for p in vae.parameters()) * torch.float32.itemsize

    def __call__(self, request: ImageRequest, text: Mapping[str, Tensor]) -> Tensor:
        """Generate a picture: fp32 [3, height, width] in [0, 1]; not finite where the model is."""
        unet = self.model.denoiser
        assert isinstance(unet, diffusers.UNet2DConditionModel)
        generator = torch.Generator().manual_seed(request.seed)
        scale = self.model.latent_scale
        size = (1, unet.config["in_channels"], request.height // scale, request.width // scale)
        noise = torch.randn(size, generator=generator)
        embeddings = {
            f"{start}{end}": text[name][index : index + 1].to(unet.device, unet.dtype)
            for name, end in (("context", "prompt_embeds"), ("pooled", "pooled_prompt_embeds"))
            if name in text
            for index, start in enumerate(("", "negative_"))
        }
        pipeline = self._pipeline(unet, make_scheduler(request.sampler, self.model.schedule))
        latents = pipeline(
            **embeddings,
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            latents=noise.to(unet.device, unet.dtype),
            generator=generator,
            output_type="latent",
        ).images
        return self._decode(latents)

    def _pipeline(self, unet: diffusers.UNet2DConditionModel, scheduler: Any) -> Any:
        """Make diffusers' pipeline without what it is not needed for.

        Prompts come encoded, and the VAE decodes in a precision of its own.
        """
        # Imports image processors too, which have opinions about torchvision.
        with quiet("transformers"):
            kind = getattr(diffusers, self.model.family.pipeline)
        others: dict[str, bool | None] = {
            name: None if parameter.default is inspect.Parameter.empty else False
            for name, parameter in inspect.signature(kind).parameters.items()
            if parameter.default is inspect.Parameter.empty or name in _UNWANTED
        }
        pipeline = kind(**{**others, "unet": unet, "scheduler": scheduler})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode latents [1, 4, h, w] in fp32: some VAEs overflow in fp16."""
        with self._vae_ready(latents.device), torch.autocast(latents.device.type, enabled=False):
            image: Tensor = self.vae.decode(latents.float() / self.model.latent_scaling).sample
        return (image[0].float().cpu() / 2 + 0.5).clamp(0, 1)

    @contextmanager
    def _vae_ready(self, device: torch.device) -> Iterator[None]:
        home, dtype = self.vae.device, self.vae.dtype
        # Past diffusers' own method, which warns whenever it is told a type.
        nn.Module.to(self.vae, device, torch.float32)
        try:
            yield
        finally:
            # From 16 bits to 32 and back is exact.
            nn.Module.to(self.vae, home, dtype)
