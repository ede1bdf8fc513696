"""Reading a model from a diffusers folder, with diffusers' and transformers' own loaders."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from sdxl_train.errors import UserError
from sdxl_train.ldm.checkpoint import fill_position_ids
from sdxl_train.ldm.headers import counted
from sdxl_train.ldm.sources import variant_of
from sdxl_train.ldm.unfilled import without_weights
from sdxl_train.ldm.unread import Reader, stamps_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from torch import nn

    from sdxl_train.ldm.family import ClipEncoder, Family

_DIFFUSERS: Final = "diffusion_pytorch_model"
_TRANSFORMERS: Final = "model"
"""What the files of weights are called, without variant, number and ending."""


def load_unet(folder: Path, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """Load the U-Net of a model folder."""
    if device.type == "meta":
        unet = _of_shapes(UNet2DConditionModel, folder / "unet")
        _cast(unet, dtype)
        return unet
    return _load_diffusers(UNet2DConditionModel, folder / "unet", device, dtype)


def unread_vae(
    folder: Path, device: torch.device, dtype: torch.dtype
) -> tuple[AutoencoderKL, Reader]:
    """Give a VAE without weights, from its own folder."""
    vae = _of_shapes(AutoencoderKL, folder)

    def load() -> nn.Module:
        loaded: nn.Module = _load_diffusers(AutoencoderKL, folder, device, dtype)
        return loaded

    return vae, _reader(vae, folder, _DIFFUSERS, device, dtype, load)


def unread_text_encoders(
    folder: Path, family: Family, device: torch.device, dtype: torch.dtype, attention: str
) -> list[tuple[nn.Module, Reader]]:
    """Give the text encoders of a model folder without weights."""
    return [
        _unread_text_encoder(form, folder / form.folder, device, dtype, attention)
        for form in family.text_encoders
    ]


def _unread_text_encoder(
    form: ClipEncoder, folder: Path, device: torch.device, dtype: torch.dtype, attention: str
) -> tuple[nn.Module, Reader]:
    kind: Any = CLIPTextModelWithProjection if form.projects else CLIPTextModel
    config = CLIPTextConfig.from_pretrained(folder, attn_implementation=attention)
    with without_weights():
        encoder: nn.Module = kind(config)

    def load() -> nn.Module:
        with _quiet_transformers():
            loaded, report = kind.from_pretrained(
                folder,
                dtype=dtype,
                variant=variant_of(folder, _TRANSFORMERS),
                use_safetensors=True,
                local_files_only=True,
                attn_implementation=attention,
                output_loading_info=True,
            )
        _require_complete(folder, report)
        there: nn.Module = loaded.to(device)
        return there

    return encoder, _reader(encoder, folder, _TRANSFORMERS, device, dtype, load)


def _reader(
    module: nn.Module,
    folder: Path,
    stem: str,
    device: torch.device,
    dtype: torch.dtype,
    load: Callable[[], nn.Module],
) -> Reader:
    """Give what puts the weights of another such module into one that has none."""

    def read() -> None:
        if device.type == "meta":
            _cast(module, dtype)
            return
        module.load_state_dict(load().state_dict(), assign=True)
        fill_position_ids(module, device)

    files = tuple(sorted(folder.glob(f"{stem}*.safetensors")))
    return Reader(files=files, stamps=stamps_of(files), dtype=dtype, read=read)


def _of_shapes(kind: Any, folder: Path) -> Any:
    with without_weights():
        return kind.from_config(kind.load_config(folder))


def _load_diffusers(kind: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    model, report = kind.from_pretrained(
        folder,
        torch_dtype=dtype,
        variant=variant_of(folder, _DIFFUSERS),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    _require_complete(folder, report)
    return model.to(device)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of a part on the meta device (diffusers warns of ``to(dtype)``)."""
    state = {name: tensor.to(dtype) for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


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
