"""Reading a model from a diffusers folder, with diffusers' and transformers' own loaders."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from sdxl_train.errors import UserError
from sdxl_train.ldm.headers import counted
from sdxl_train.ldm.sources import variant_of
from sdxl_train.ldm.unfilled import without_weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from torch import nn

    from sdxl_train.ldm.family import Family


def load_unet(folder: Path, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """Load the U-Net of a model folder."""
    return _load_diffusers(UNet2DConditionModel, folder / "unet", device, dtype)


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """Load a VAE from its own folder."""
    return _load_diffusers(AutoencoderKL, folder, device, dtype)


def load_text_encoders(
    folder: Path, family: Family, device: torch.device, dtype: torch.dtype, attention: str
) -> tuple[nn.Module, ...]:
    """Load the text encoders of a model folder."""
    return tuple(
        _load_transformers(
            CLIPTextModelWithProjection if encoder.projects else CLIPTextModel,
            folder / encoder.folder,
            device,
            dtype,
            attention,
        )
        for encoder in family.text_encoders
    )


def _load_diffusers(kind: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    if device.type == "meta":
        with without_weights():
            return _cast(kind.from_config(kind.load_config(folder)), dtype)
    model, report = kind.from_pretrained(
        folder,
        torch_dtype=dtype,
        variant=variant_of(folder, "diffusion_pytorch_model"),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    _require_complete(folder, report)
    return model.to(device)


def _load_transformers(
    kind: Any, folder: Path, device: torch.device, dtype: torch.dtype, attention: str
) -> Any:
    if device.type == "meta":
        config = CLIPTextConfig.from_pretrained(folder, attn_implementation=attention)
        with without_weights():
            return _cast(kind(config), dtype)
    with _quiet_transformers():
        model, report = kind.from_pretrained(
            folder,
            dtype=dtype,
            variant=variant_of(folder, "model"),
            use_safetensors=True,
            local_files_only=True,
            attn_implementation=attention,
            output_loading_info=True,
        )
    _require_complete(folder, report)
    return model.to(device)


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change the dtype of a part on the meta device (diffusers warns of ``to(dtype)``)."""
    state = {name: tensor.to(dtype) for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the progress bar of transformers, which would cut through this program's own."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _require_complete(folder: Path, report: dict[str, Any]) -> None:
    """Refuse a part whose file lacks tensors: the loaders would make them up."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError.of(str(folder), f"it lacks {counted(missing)}", "download it again")
