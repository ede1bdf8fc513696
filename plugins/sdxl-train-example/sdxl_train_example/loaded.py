"""A model in memory: what the training loop asks of it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from sdxl_train import NoiseSchedule, Part, UserError
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from sdxl_train import ImageRequest

CHANNELS, WIDTH, SCALE, LETTERS = 4, 16, 8, 1000
"""Channels of latents, width of the denoiser, pixels of the image for each latent pixel, and bytes
of a caption that are read."""


class TextEncoder(nn.Module):
    """The mean of an embedding of each byte."""

    def __init__(self) -> None:
        """Make it with random weights."""
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Encode captions: [B, WIDTH]; an empty one is zero."""
        weight = self.embedding.weight
        encoded = [weight.new_zeros(WIDTH) for _ in captions]
        for index, caption in enumerate(captions):
            if caption:
                ids = torch.tensor(list(caption.encode())[:LETTERS], device=weight.device)
                encoded[index] = self.embedding(ids).mean(0)
        return torch.stack(encoded)


class Denoiser(nn.Module):
    """Two convolutions with a mix of time and text in between."""

    def __init__(self) -> None:
        """Make it with random weights."""
        super().__init__()
        self.conv_in = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.text = nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.conv_out = nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Predict the noise in latents [B, C, h, w] at int64 timesteps [B], for text [B, WIDTH]."""
        periods = 10000.0 ** (-torch.arange(WIDTH // 2, device=noisy.device) / (WIDTH // 2))
        angles = timesteps[:, None] * periods
        time = torch.cat([angles.sin(), angles.cos()], dim=1).to(noisy.dtype)
        told = self.time(time) + self.text(text.to(noisy.dtype))
        hidden = functional.silu(self.conv_in(noisy) + told[:, :, None, None])
        mixed: Tensor = self.mix(hidden.movedim(1, -1)).movedim(-1, 1)
        predicted: Tensor = self.conv_out(functional.silu(mixed) + hidden)
        return predicted


class Modules(nn.Module):
    """All weights of a file."""

    def __init__(self) -> None:
        """Make them random."""
        super().__init__()
        self.denoiser = Denoiser()
        self.text_encoder = TextEncoder()
        self.encoder = nn.Conv2d(3, CHANNELS, SCALE, stride=SCALE)
        self.decoder = nn.ConvTranspose2d(CHANNELS, 3, SCALE, stride=SCALE)


class Loaded:
    """A model of this family; implements ``sdxl_train.LoadedModel``."""

    latent_scale = SCALE
    max_tokens = LETTERS

    def __init__(self, modules: Modules, device: torch.device) -> None:
        """Hold frozen modules on ``device``."""
        self.denoiser: nn.Module = modules.denoiser
        self.text_encoders: tuple[nn.Module, ...] = (modules.text_encoder,)
        self.schedule = NoiseSchedule.scaled_linear()
        if device.type != "meta":
            self.schedule = self.schedule.to(device)
        self._encoder: nn.Module | None = modules.encoder
        self._decoder = modules.decoder
        self._device = device
        kinds = (nn.Linear, nn.Conv2d)
        layers = [name for name, m in self.denoiser.named_modules() if isinstance(m, kinds)]
        self.parts: tuple[Part, ...] = (
            Part(
                name="denoiser",
                title="denoiser",
                group="denoiser",
                prefix="lora_unet",
                module=self.denoiser,
                # Names in files never change, whatever becomes of the paths in the module.
                file_names={layer: layer.replace(".", "_") for layer in layers},
            ),
        )
        self.frozen_parts: tuple[Part, ...] = ()

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [-1, 1]."""
        assert self._encoder is not None, "the image encoder was released"
        weight = next(self._encoder.parameters())
        latents: Tensor = self._encoder(images.to(self._device, weight.dtype))
        return latents.float()

    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Encode captions. What is given here comes back as the condition of :meth:`predict`."""
        (encoder,) = self.text_encoders
        return {"text": encoder(captions)}

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts of pictures; a family whose users weigh words reads the weights here."""
        return self.encode_text(prompts)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Count the tokens of each caption, also those that are cut off."""
        return [len(caption.encode()) for caption in captions]

    def image_encoder_identity(self) -> Mapping[str, str]:
        """Hash what shapes latents; its name is what people are told has changed."""
        assert self._encoder is not None, "the image encoder was released"
        return {"the image encoder": _hash(self._encoder)}

    def text_encoders_identity(self) -> Mapping[str, str]:
        """Hash what shapes encoded captions."""
        return {"the text encoder": _hash(*self.text_encoders)}

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Predict the noise, fp32 [B, C, h, w]."""
        dtype = next(self.denoiser.parameters()).dtype
        predicted: Tensor = self.denoiser(noisy.to(dtype), timesteps, condition["text"])
        return predicted.float()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Give what :meth:`predict` should return."""
        return noise

    def read_network(self, path: Path) -> dict[str, Tensor]:
        """Read a network's file. A real family reads the names of other trainers here too."""
        from safetensors.torch import load_file

        return load_file(path)

    def describe_network(self, tensors: Mapping[str, Tensor]) -> str:
        """Name the kinds of deltas in a network."""
        return "LoRA"

    def diffusers_network(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Name a network's tensors as diffusers reads them.

        Raises:
            UserError: Always: diffusers has no pipeline for this family.
        """
        raise UserError.of("--save_model_as", "diffusers has no pipeline for this family")

    def merge_networks(self, networks: Sequence[tuple[Path, float]]) -> None:
        """Add LoRA files, each times its multiplier, to the weights.

        Raises:
            UserError: If a file has a layer that this model has not, or of another shape.
        """
        (part,) = self.parts
        layers = {f"{part.prefix}_{name}": path for path, name in part.file_names.items()}
        for path, multiplier in networks:
            tensors = self.read_network(path)
            for name in sorted({key.partition(".")[0] for key in tensors}):
                if name not in layers:
                    raise UserError.of(str(path), f"{name} is no layer of this model")
                up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
                delta = up.flatten(1) @ down.flatten(1) * (tensors[f"{name}.alpha"] / len(down))
                weight = self.denoiser.get_parameter(f"{layers[name]}.weight")
                if delta.numel() != weight.numel():
                    raise UserError.of(str(path), f"{name} has another shape in this model")
                if self._device.type == "meta":
                    continue
                weight.data = weight + multiplier * delta.view(weight.shape).to(weight)

    def sampler(self) -> Sampler:
        """Give what generates pictures."""
        return Sampler(self, self._decoder)

    def release_image_encoder(self) -> None:
        """Free the image encoder."""
        self._encoder = None

    def release_text_encoders(self) -> None:
        """Free the text encoder."""
        self.text_encoders = ()

    def metadata(self) -> dict[str, str]:
        """Describe the base model for the header of saved files."""
        return {"ss_base_model_version": "example"}


class Sampler:
    """Generates pictures by DDIM (Song et al. 2021, eq. 12 without noise)."""

    def __init__(self, model: Loaded, decoder: nn.Module) -> None:
        """Keep the decoder, which a run that caches latents needs for nothing else."""
        self.model, self.decoder = model, decoder
        self.decoder_bytes = sum(p.numel() * p.element_size() for p in decoder.parameters())

    def __call__(self, request: ImageRequest, text: Mapping[str, Tensor]) -> Tensor:
        """Generate a picture: fp32 [3, H, W] in [0, 1] on the CPU."""
        model, device = self.model, self.model.schedule.alphas_cumprod.device
        generator = torch.Generator().manual_seed(request.seed)
        shape = (1, CHANNELS, request.height // SCALE, request.width // SCALE)
        x = torch.randn(shape, generator=generator).to(device)
        abars = model.schedule.alphas_cumprod
        times = torch.linspace(len(abars) - 1, 0, request.steps).long().tolist()
        for index, time in enumerate(times):
            told = torch.tensor([time, time], device=device)
            wanted, unwanted = model.predict(torch.cat([x, x]), told, text).chunk(2)
            noise = unwanted + request.guidance_scale * (wanted - unwanted)
            abar = abars[time]
            image = (x - (1 - abar).sqrt() * noise) / abar.sqrt()
            last = index + 1 == len(times)
            after = torch.ones_like(abar) if last else abars[times[index + 1]]
            x = after.sqrt() * image + (1 - after).sqrt() * noise
        dtype = next(self.decoder.parameters()).dtype
        decoded: Tensor = self.decoder(x.to(dtype))[0]
        return decoded.float().sigmoid().cpu()


def _hash(*modules: nn.Module) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for name, parameter in module.named_parameters():
            digest.update(f"{name} {parameter.dtype}".encode())
            digest.update(parameter.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()
