"""Loading SDXL from whatever its options name: file, folder or hub id."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.checkpoint import checkpoint

from sdxl_lora_plugins.model import folder as folders
from sdxl_lora_plugins.model import hub
from sdxl_lora_plugins.model.checkpoint import Checkpoint
from sdxl_lora_plugins.model.configs import LATENT_SCALING
from sdxl_lora_plugins.model.headers import read_header
from sdxl_lora_plugins.model.loaded import LoadedSdxl, Modules, Origins
from sdxl_lora_plugins.model.sources import (
    PARTS,
    Source,
    base_faults,
    locate,
    vae_faults,
    vae_folder,
)
from sdxl_lora_plugins.model.text import CHUNK_TOKENS
from sdxl_lora_plugins.model.tokenizer import load_tokenizers
from sdxl_train import Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from diffusers import AutoencoderKL
    from torch import nn

    from sdxl_lora_plugins.model import Sdxl
    from sdxl_lora_plugins.model.headers import Fault
    from sdxl_train import PredictionType

_log = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(options: Sdxl, device: torch.device, dtype: torch.dtype) -> LoadedSdxl:
    """Load the model that the options name, frozen and in evaluation mode.

    Raises:
        UserError: If a source is not what it must be, or is incomplete.
    """
    base = _base_source(options, device)
    vae_source = _vae_source(options, device)
    if base.kind == "file":
        modules, scaling = _load_file(options, base, vae_source, device, dtype)
    else:
        modules, scaling = _load_folder(options, base, vae_source, device, dtype)
    rates = options.rates()
    _warn_of_unused_rates(options)
    _prepare(options, modules, rates.keys())
    return LoadedSdxl(
        modules,
        rates=rates,
        prediction_type=_prediction_type(options, base),
        num_chunks=(options.max_token_length or CHUNK_TOKENS) // CHUNK_TOKENS,
        latent_scaling=scaling,
        origins=Origins(
            model=base.path if base.kind == "file" else None,
            model_name=_public_name(base),
            vae=vae_source.path if vae_source and vae_source.kind == "file" else None,
            vae_name=_public_name(vae_source) if vae_source else None,
        ),
        device=device,
    )


def _base_source(options: Sdxl, device: torch.device) -> Source:
    name = options.pretrained_model_name_or_path
    faults = partial(base_faults, vae_given=options.vae is not None)
    subfolders = ["", *PARTS, "scheduler", "tokenizer", "tokenizer_2"]
    if options.vae is not None:
        subfolders.remove("vae")
    return _usable(name, faults, subfolders, device)


def _vae_source(options: Sdxl, device: torch.device) -> Source | None:
    if options.vae is None:
        return None
    return _usable(options.vae, vae_faults, ["", "vae"], device)


def _usable(
    name: str,
    faults: Callable[[Source], Iterable[Fault]],
    subfolders: list[str],
    device: torch.device,
) -> Source:
    """Locate a source, download it if it is a hub id without a complete copy, and check it."""
    source = locate(name)
    found = list(faults(source))
    if source.downloadable and found:
        weights = device.type != "meta"
        path = hub.download(name, subfolders=subfolders, weights=weights)
        source = Source(kind="hub", name=name, path=path)
        found = list(faults(source)) if weights else []
    if found:
        raise UserError(
            Problem(place=name, message=fault.message, remedy=fault.remedy) for fault in found
        )
    return source


def _load_file(
    options: Sdxl,
    base: Source,
    vae_source: Source | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Modules, float]:
    assert base.path is not None
    file = Checkpoint(base.path, device)
    te1, te2 = file.text_encoders(dtype, _attention(options))
    modules = Modules(
        unet=file.unet(dtype),
        te1=te1,
        te2=te2,
        vae=_load_vae(vae_source, device, _vae_dtype(options))
        if vae_source
        else file.vae(_vae_dtype(options)),
        tokenizers=load_tokenizers(None, options.tokenizer_cache_dir),
    )
    file.warn_of_unused(vae_replaced=vae_source is not None)
    return modules, LATENT_SCALING


def _load_folder(
    options: Sdxl,
    base: Source,
    vae_source: Source | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Modules, float]:
    assert base.path is not None
    te1, te2 = folders.load_text_encoders(base.path, device, dtype, _attention(options))
    modules = Modules(
        unet=folders.load_unet(base.path, device, dtype),
        te1=te1,
        te2=te2,
        vae=_load_vae(vae_source, device, _vae_dtype(options))
        if vae_source
        else folders.load_vae(base.path / "vae", device, _vae_dtype(options)),
        tokenizers=load_tokenizers(base.path, options.tokenizer_cache_dir),
    )
    # The U-Net was trained on latents of this scale, whichever VAE makes them now.
    config = _read_config(base.path / "vae" / "config.json")
    return modules, float(config.get("scaling_factor", LATENT_SCALING))


def _load_vae(source: Source, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    assert source.path is not None
    if source.kind == "file":
        return Checkpoint(source.path, device).vae(dtype)
    folder = vae_folder(source.path)
    assert folder is not None
    return folders.load_vae(folder, device, dtype)


def _prepare(options: Sdxl, modules: Modules, trained: Iterable[str]) -> None:
    """Freeze everything, and choose how attention and the backward pass are computed."""
    for module in (modules.unet, modules.te1, modules.te2, modules.vae):
        module.requires_grad_(False)
        module.eval()
    if not options.sdpa:
        modules.unet.set_attn_processor(AttnProcessor())
    if options.gradient_checkpointing:
        modules.unet.enable_gradient_checkpointing()
        # transformers recomputes in training mode only. CLIP has no dropout, so nothing else
        # changes by it.
        for name, encoder in (("te1", modules.te1), ("te2", modules.te2)):
            if name in trained:
                _checkpoint_layers(encoder)
                encoder.train()


def _warn_of_unused_rates(options: Sdxl) -> None:
    """Name the rates that a flag makes idle: sd-scripts' users keep them in their commands."""
    excluded: list[tuple[str, str]] = []
    if options.network_train_unet_only:
        excluded += [
            (name, "network_train_unet_only")
            for name in ("text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2")
        ]
    if options.network_train_text_encoder_only:
        excluded.append(("unet_lr", "network_train_text_encoder_only"))
    for name, flag in excluded:
        if getattr(options, name):
            _log.warning("%s has no effect: %s is set", name, flag)


def _checkpoint_layers(encoder: nn.Module) -> None:
    """Recompute each layer in the backward pass (the protocol of GradientCheckpointingLayer)."""
    for module in encoder.modules():
        if hasattr(module, "gradient_checkpointing"):
            layer = cast("Any", module)
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _prediction_type(options: Sdxl, base: Source) -> PredictionType:
    """Choose what the U-Net predicts: by the flag, else by what the model says of itself."""
    said, where = _said_prediction_type(base)
    if options.v_parameterization:
        if said == "epsilon":
            _log.warning("--v_parameterization trains v-prediction, but %s says epsilon", where)
        _log.info("prediction type: v_prediction (--v_parameterization)")
        return "v_prediction"
    _log.info("prediction type: %s (%s)", said or "epsilon", where or "default of SDXL")
    return said or "epsilon"


def _said_prediction_type(base: Source) -> tuple[PredictionType | None, str]:
    """Read the prediction type off a model, and where it stands there."""
    assert base.path is not None
    if base.kind != "file":
        config = _read_config(base.path / "scheduler" / "scheduler_config.json")
        if config.get("rescale_betas_zero_snr"):
            _warn_of_zero_snr("its scheduler_config.json")
        said = config.get("prediction_type")
        where = "scheduler_config.json" if said in ("epsilon", "v_prediction") else ""
        return (said if where else None), where
    header = read_header(base.path)
    if "ztsnr" in header.shapes:
        _warn_of_zero_snr("its marker ztsnr")
    if "v_pred" in header.shapes:
        return "v_prediction", "the marker v_pred"
    said = header.metadata.get("modelspec.prediction_type", "")
    types: dict[str, PredictionType] = {
        "v": "v_prediction",
        "v_prediction": "v_prediction",
        "epsilon": "epsilon",
    }
    return types.get(said), "its metadata" if said in types else ""


def _warn_of_zero_snr(where: str) -> None:
    _log.warning(
        "the model was made for zero terminal SNR (%s); it is not applied in this run", where
    )


def _attention(options: Sdxl) -> str:
    return "sdpa" if options.sdpa else "eager"


def _vae_dtype(options: Sdxl) -> torch.dtype:
    return _DTYPES[options.vae_dtype]


def _public_name(source: Source) -> str:
    """Name a source without saying where it is on this machine."""
    if source.kind == "hub":
        return source.name
    return Path(source.name).name


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
