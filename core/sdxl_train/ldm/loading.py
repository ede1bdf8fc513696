"""Loading a model from whatever its options name: file, folder or hub id."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sdxl_train.errors import Problem, UserError
from sdxl_train.ldm import hub
from sdxl_train.ldm.attention import set_attention
from sdxl_train.ldm.channels_last import use_channels_last
from sdxl_train.ldm.checkpoint import Checkpoint
from sdxl_train.ldm.compiling import compile_blocks
from sdxl_train.ldm.folder import ModelFolder
from sdxl_train.ldm.loaded import Computing, LoadedLdm, Modules, Origins
from sdxl_train.ldm.prediction import Said, said_by
from sdxl_train.ldm.recomputing import recompute_encoder, recompute_unet
from sdxl_train.ldm.sources import (
    Source,
    base_faults,
    locate,
    read_json,
    vae_faults,
)
from sdxl_train.ldm.text import CHUNK_TOKENS, TextOptions
from sdxl_train.ldm.tokenizer import load_tokenizers
from sdxl_train.schedule import NoiseSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import nn

    from sdxl_train.ldm.headers import Fault
    from sdxl_train.ldm.model import LdmModel
    from sdxl_train.ldm.unread import Reader

_log = logging.getLogger(__name__)

_Loaded = TypeVar("_Loaded", bound=LoadedLdm)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(options: LdmModel, device: torch.device, dtype: torch.dtype) -> LoadedLdm:
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
    origins = Origins(
        model=base.path if base.kind == "file" else None,
        model_name=_public_name(base),
        vae=vae_source.path if vae_source and vae_source.kind == "file" else None,
        vae_name=_public_name(vae_source) if vae_source else None,
    )
    said = said_by(base, pickles=options.family.pickles)
    return made_ready(LoadedLdm, options, modules, said, origins, scaling=scaling, device=device)


def made_ready(
    kind: type[_Loaded],
    options: LdmModel,
    modules: Modules,
    said: Said,
    origins: Origins,
    *,
    scaling: float,
    device: torch.device,
) -> _Loaded:
    """Make a model of its parts: frozen, and stored and computed as the options say."""
    rates = options.rates()
    _prepare(options, modules, rates.keys())
    return kind(
        options.family,
        modules,
        rates=rates,
        schedule=_schedule(options, said),
        reading=_reading(options, modules),
        latent_scaling=scaling,
        origins=origins,
        device=device,
        computing=Computing(
            offloads=options.cpu_offload_checkpointing,
            keeps_memory=options.highvram,
            channels_last=options.channels_last,
            reuses_memory=options.reuses_memory,
        ),
    )


def _reading(options: LdmModel, modules: Modules) -> TextOptions:
    """Give how captions are read.

    Raises:
        UserError: If there is no such layer to take.
    """
    layers = min(encoder.config.num_hidden_layers for encoder in _encoders(modules))
    if options.clip_skip is not None and options.clip_skip > layers:
        raise UserError.of(
            "--clip_skip",
            f"takes layer {options.clip_skip} from the last, and a text encoder of this model has "
            f"{layers}",
            f"leave it out, as is usual for {options.family.title}",
        )
    return TextOptions(
        num_chunks=(options.max_token_length or CHUNK_TOKENS) // CHUNK_TOKENS,
        clip_skip=options.clip_skip or options.family.usual_layer,
        weighted=options.weighted_captions,
        final_norm=options.family.final_norm,
    )


def _encoders(modules: Modules) -> Sequence[Any]:
    return modules.text_encoders


def _base_source(options: LdmModel, device: torch.device) -> Source:
    name = options.pretrained_model_name_or_path
    family = options.family
    faults = partial(base_faults, family=family, vae_given=options.vae is not None)
    tokenizers = [encoder.tokenizer for encoder in family.text_encoders]
    subfolders = ["", *family.folders, "scheduler", *tokenizers]
    if options.vae is not None:
        subfolders.remove("vae")
    return _usable(name, faults, subfolders, device)


def _vae_source(options: LdmModel, device: torch.device) -> Source | None:
    if options.vae is None:
        return None
    faults = partial(vae_faults, family=options.family)
    return _usable(options.vae, faults, ["", "vae"], device)


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
    options: LdmModel,
    base: Source,
    vae_source: Source | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Modules, float]:
    assert base.path is not None
    file = Checkpoint(base.path, options.family, device, mapped=options.maps_files)
    encoders = file.text_encoders(dtype, text_attention(options))
    modules = _modules(
        options,
        file.unet(dtype),
        encoders,
        _vae(options, vae_source, device) if vae_source else file.vae(_vae_dtype(options)),
        base=None,
    )
    file.warn_of_unused(vae_replaced=vae_source is not None)
    return modules, options.family.latent_scaling


def _load_folder(
    options: LdmModel,
    base: Source,
    vae_source: Source | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Modules, float]:
    assert base.path is not None
    family = options.family
    folder = ModelFolder(base.path, family, device, mapped=options.maps_files)
    modules = _modules(
        options,
        folder.unet(dtype),
        folder.text_encoders(dtype, text_attention(options)),
        _vae(options, vae_source, device) if vae_source else folder.vae(_vae_dtype(options)),
        base=base.path,
    )
    # The U-Net was trained on latents of this scale, whichever VAE makes them now.
    config = read_json(base.path / "vae" / "config.json")
    return modules, float(config.get("scaling_factor", family.latent_scaling))


def _modules(
    options: LdmModel,
    unet: tuple[UNet2DConditionModel, Reader | None],
    text_encoders: Sequence[tuple[nn.Module, Reader | None]],
    vae: tuple[AutoencoderKL, Reader | None],
    *,
    base: Path | None,
) -> Modules:
    """Put a model together of parts that are not read yet; its tokenizers from a folder."""
    return Modules(
        unet=unet[0],
        text_encoders=tuple(encoder for encoder, _ in text_encoders),
        vae=vae[0],
        tokenizers=load_tokenizers(options.family.text_encoders, base, options.tokenizer_cache_dir),
        readers={part: read for part, read in (unet, *text_encoders, vae) if read is not None},
    )


def _vae(
    options: LdmModel, source: Source, device: torch.device
) -> tuple[AutoencoderKL, Reader | None]:
    assert source.path is not None
    kind = Checkpoint if source.kind == "file" else ModelFolder
    of_vae = kind(source.path, options.family, device, mapped=options.maps_files)
    return of_vae.vae(_vae_dtype(options))


def _prepare(options: LdmModel, modules: Modules, trained: Collection[str]) -> None:
    """Freeze everything, and choose how it is stored and computed with."""
    for module in (modules.unet, *modules.text_encoders, modules.vae):
        module.requires_grad_(False)
        module.eval()
    set_attention(modules.unet, options.attention)
    if options.channels_last:
        use_channels_last(modules.unet)
    if options.torch_compile:
        compile_blocks(modules.unet, options)
    if options.gradient_checkpointing:
        recompute_unet(modules.unet, options.checkpoint_levels)
        forms = options.family.text_encoders
        for form, encoder in zip(forms, modules.text_encoders, strict=True):
            if form.name in trained:
                recompute_encoder(encoder)


def _schedule(options: LdmModel, said: Said) -> NoiseSchedule:
    """Make the noise schedule: by the options, else by what the model says of itself."""
    schedule = NoiseSchedule.scaled_linear(prediction_type=options.prediction_type(said))
    where = "--v_parameterization"
    if options.v_parameterization is None:
        where = said.prediction_place or f"default of {options.family.title}"
    _log.info("the model predicts %s (%s)", schedule.prediction_type, where)
    if not options.has_zero_terminal_snr(said):
        return schedule
    where = said.schedule_place if options.zero_terminal_snr is None else "--zero_terminal_snr"
    _log.info("noise schedule of zero terminal SNR (%s)", where)
    return schedule.with_zero_terminal_snr()


def text_attention(options: LdmModel) -> str:
    """Name transformers' implementation of attention."""
    return "sdpa" if options.sdpa else "eager"


def _vae_dtype(options: LdmModel) -> torch.dtype:
    return _DTYPES[options.vae_dtype]


def _public_name(source: Source) -> str:
    """Name a source without saying where it is on this machine."""
    if source.kind == "hub":
        return source.name
    return Path(source.name).name
