"""The base model of the demo: an SDXL so small that it learns to draw in half a minute.

Its topology and file layout are SDXL's; only the widths differ, and a VAE that shrinks pictures 4
times instead of 8. It predicts the velocity, because a small network reaches the mean of a picture
far sooner that way than by way of the noise.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from tqdm import tqdm

from sdxl_lora_plugins.commands import demo_images
from sdxl_lora_plugins.model import SDXL, TINY, Sdxl
from sdxl_train.ldm import write_tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from PIL import Image
    from torch import Tensor

    from sdxl_train.ldm import LoadedLdm

_UNET: Final[dict[str, Any]] = {
    "sample_size": demo_images.SIZE // 4,
    "transformer_layers_per_block": (1, 1, 1),
    "norm_num_groups": 4,
}
_VAE: Final[dict[str, Any]] = {
    "sample_size": demo_images.SIZE,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    # More groups would take the mean colour out of every few channels.
    "norm_num_groups": 1,
}
_PICTURES_OF_EACH: Final = 16
_BATCH: Final = 16


def make_base_model(folder: Path, *, steps: int, seed: int) -> None:
    """Write a tiny SDXL that draws the plain shapes by their captions.

    Its VAE has seen zogs too, as that of the real SDXL has seen everything; its U-Net has not.

    Args:
        folder: A new folder.
        steps: Training steps of the U-Net; half as many for the VAE.
        seed: Of the weights, the pictures and the training.
    """
    chance = random.Random(seed)
    captions = [c for c in demo_images.shape_captions() for _ in range(_PICTURES_OF_EACH)]
    shapes = pixels([demo_images.draw(caption, chance) for caption in captions])
    zogs = [demo_images.draw(demo_images.ZOG, chance) for _ in range(2 * _PICTURES_OF_EACH)]
    write_tiny(folder, SDXL, TINY, seed=seed, prediction_type="v_prediction")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = _resized(AutoencoderKL, folder / "vae", _VAE)
        _resized(UNet2DConditionModel, folder / "unet", _UNET).save_pretrained(folder / "unet")
        _train_vae(vae, torch.cat([shapes, pixels(zogs)]), steps // 2)
        vae.save_pretrained(folder / "vae")
        model = Sdxl(pretrained_model_name_or_path=str(folder)).build("cpu", torch.float32)
        _train_unet(model, shapes, captions, steps)
    unet: Any = model.denoiser
    unet.save_pretrained(folder / "unet")


def pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Turn pictures into a tensor [B, 3, H, W] in [-1, 1]."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def condition(text: Mapping[str, Tensor], num_pictures: int) -> dict[str, Tensor]:
    """Complete encoded text to what the U-Net is told of pictures of the demo's size."""
    side = torch.full((num_pictures, 2), demo_images.SIZE)
    return {
        **text,
        "original_size": side,
        "crop_top_left": torch.zeros_like(side),
        "target_size": side,
    }


def _resized(kind: Any, folder: Path, changes: Mapping[str, Any]) -> Any:
    """Build a part of other dimensions in place of the one in the folder."""
    part = kind.from_config({**kind.load_config(folder), **changes})
    for name, parameter in part.named_parameters():
        # Residual branches add nothing at first, so that signals pass all layers from the start.
        if name.endswith((".conv2.weight", ".conv2.bias", "proj_out.weight", "to_out.0.weight")):
            nn.init.zeros_(parameter)
    return part


def _train_vae(vae: AutoencoderKL, pictures: Tensor, steps: int) -> None:
    """Teach the VAE to reproduce pictures [N, 3, H, W]."""
    for name, module in vae.named_modules():
        # Outside of the residual branches, colours pass straight through. From there on a
        # hundred steps are enough; from random weights the colours alone would take thousands.
        if isinstance(module, nn.Conv2d) and not name.endswith(("conv1", "conv2")):
            _pass_through(module)
    generator = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        batch = pictures[torch.randint(len(pictures), (_BATCH // 2,), generator=generator)]
        latents = vae.encode(batch).latent_dist.mode()
        # The decoder must forgive latents that are not quite right: a U-Net will make them.
        spread = latents.std(dim=(0, 2, 3), keepdim=True).detach()
        noise = 0.05 * spread * torch.randn(latents.shape, generator=generator)
        decoded = vae.decode(latents + noise).sample
        return F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch)

    _train(vae, loss, steps, lr=1e-3, title="training the VAE")
    _normalize_latents(vae, pictures)


def _pass_through(layer: nn.Conv2d) -> None:
    """Make the first channels of a convolution copies of its input's."""
    copied = min(layer.in_channels, layer.out_channels)
    middle = layer.kernel_size[0] // 2
    with torch.no_grad():
        layer.weight[:copied] = 0.0
        layer.weight[range(copied), range(copied), middle, middle] = 1.0
        assert layer.bias is not None
        layer.bias[:copied] = 0.0


@torch.no_grad()
def _normalize_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Give the scaled latents of pictures zero mean and unit variance, channel by channel."""
    latents = vae.encode(pictures).latent_dist.mode()
    channels = latents.shape[1]
    mean, scale = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    scale = scale * vae.config["scaling_factor"]
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight *= scale.view(1, -1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / scale
    quant.weight[:channels] /= scale.view(-1, 1, 1, 1)


def _train_unet(model: LoadedLdm, pictures: Tensor, captions: Sequence[str], steps: int) -> None:
    """Teach the U-Net to draw pictures [N, 3, H, W] by their captions."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = model.encode_images(pictures)
        texts = model.encode_text(list(captions))
    model.denoiser.requires_grad_(True)
    ladder, num_timesteps = torch.arange(_BATCH), model.schedule.num_timesteps

    def loss() -> Tensor:
        chosen = torch.randint(len(latents), (_BATCH,), generator=generator)
        clean = latents[chosen]
        # One timestep from each sixteenth of the schedule: far less noisy than sixteen at random.
        share = (ladder + torch.rand(_BATCH, generator=generator)) / _BATCH
        timesteps = (share * num_timesteps).long().clamp(max=num_timesteps - 1)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = model.schedule.add_noise(clean, noise, timesteps)
        told = condition({name: text[chosen] for name, text in texts.items()}, _BATCH)
        predicted = model.predict(noisy, timesteps, told)
        return F.mse_loss(predicted, model.target(clean, noise, timesteps))

    _train(model.denoiser, loss, steps, lr=5e-3, title="training the U-Net")


def _train(
    part: nn.Module, loss: Callable[[], Tensor], steps: int, *, lr: float, title: str
) -> None:
    optimizer = torch.optim.AdamW(
        part.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=1e-3, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps + 1, pct_start=0.1
    )
    for _ in tqdm(range(steps), desc=title, unit="step", disable=None):
        torch.autograd.backward(loss())
        nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
