"""Sources of base models and VAEs: what a name stands for, and whether it can serve.

Reads headers and configurations only, asks no network and imports no torch.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from sdxl_lora_plugins.model import hub, kinds
from sdxl_lora_plugins.model.headers import BadFileError, Fault, read_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_lora_plugins.model.headers import Shapes

PARTS: Final = {
    "unet": ("U-Net", "diffusion_pytorch_model"),
    "text_encoder": ("text encoder 1 (CLIP ViT-L/14)", "model"),
    "text_encoder_2": ("text encoder 2 (OpenCLIP ViT-bigG/14)", "model"),
    "vae": ("VAE", "diffusion_pytorch_model"),
}
"""Subfolders of a diffusers folder that hold weights: title and stem of their files."""

_COMPLETE = "use a complete model: no option supplies this part"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a name stands for.

    Attributes:
        kind: A ``file``, a diffusers ``folder``, a ``hub`` id, or ``missing``.
        name: The name as given.
        path: The file or folder; for a hub id, its folder in the local cache, if any.
    """

    kind: Literal["file", "folder", "hub", "missing"]
    name: str
    path: Path | None = None

    @property
    def downloadable(self) -> bool:
        """Whether what is missing here may be had from the hub."""
        return self.kind == "hub" and not hub.is_offline()


def locate(name: str) -> Source:
    """Find out what a name stands for: files and folders come before hub ids."""
    path = Path(name).expanduser()
    if path.is_file():
        return Source(kind="file", name=name, path=path)
    if path.is_dir():
        return Source(kind="folder", name=name, path=path)
    if hub.looks_like_id(name):
        return Source(kind="hub", name=name, path=hub.cached_snapshot(name))
    return Source(kind="missing", name=name, path=path)


def base_faults(source: Source, *, vae_given: bool) -> Iterator[Fault]:
    """Yield why what is here cannot serve as the base model."""
    try:
        if source.path is None or source.kind == "missing":
            yield from _absence(source)
        elif source.kind == "file":
            yield from _base_file_faults(source.path, vae_given=vae_given)
        else:
            yield from _base_folder_faults(source.path, vae_given=vae_given)
    except BadFileError as error:
        yield error.fault


def vae_faults(source: Source) -> Iterator[Fault]:
    """Yield why what is here cannot serve as the VAE."""
    try:
        if source.path is None or source.kind == "missing":
            yield from _absence(source)
        elif source.kind == "file":
            yield from _vae_file_faults(source.path)
        elif folder := vae_folder(source.path):
            yield from _weights_faults(folder, *PARTS["vae"])
        else:
            yield Fault(
                message=f"{source.path.name} is a folder without a VAE: neither it nor its "
                "subfolder vae has the config.json of an AutoencoderKL",
                remedy="name a VAE's folder or its .safetensors file",
            )
    except BadFileError as error:
        yield error.fault


def vae_folder(folder: Path) -> Path | None:
    """Find the folder of the VAE itself: ``folder/vae`` in a whole model, or ``folder``."""
    inner = folder / "vae"
    if (inner / "config.json").is_file():
        return inner
    is_vae = read_json(folder / "config.json").get("_class_name") == "AutoencoderKL"
    return folder if is_vae else None


def variant_of(folder: Path, stem: str) -> str | None:
    """Give the variant of the weights in a part's folder: None if plain, else ``fp16``."""
    plain = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    if any((folder / name).is_file() for name in plain):
        return None
    return "fp16" if any(folder.glob(f"{stem}*fp16*")) else None


def _absence(source: Source) -> Iterator[Fault]:
    """Say that there is no such path, or that a hub id cannot be had offline."""
    if source.path is None:
        yield Fault(
            message=f"{source.name!r} is no file or folder here, and as a hub id it is not in "
            "the local cache while HF_HUB_OFFLINE forbids to download it",
            remedy="give a file or folder, or unset HF_HUB_OFFLINE once",
        )
        return
    siblings = source.path.parent.iterdir() if source.path.parent.is_dir() else ()
    near = difflib.get_close_matches(source.path.name, [path.name for path in siblings], n=1)
    yield Fault(
        message=f"there is no file or folder {source.name!r}",
        remedy=f"is it {near[0]!r}?" if near else "check the path",
    )


def _base_file_faults(path: Path, *, vae_given: bool) -> Iterator[Fault]:
    shapes = read_header(path).shapes
    kind = kinds.kind_of(shapes)
    if kind != kinds.SDXL:
        yield Fault(message=f"{path.name} is {kind}", remedy="name an SDXL base checkpoint")
        return
    for part, remedy in kinds.missing_parts(shapes, vae_given=vae_given):
        yield Fault(message=f"{path.name} is an SDXL checkpoint without its {part}", remedy=remedy)


def _vae_file_faults(path: Path) -> Iterator[Fault]:
    shapes = read_header(path).shapes
    channels = _latent_channels(shapes)
    if channels is None:
        kind = kinds.kind_of(shapes)
        yield Fault(message=f"{path.name} is {kind}, without a VAE in it", remedy="name a VAE")
    elif channels != kinds.LATENT_CHANNELS:
        yield Fault(
            message=f"{path.name} is a VAE of {channels} latent channels (Flux and Stable "
            f"Diffusion 3 have 16); SDXL needs {kinds.LATENT_CHANNELS}",
            remedy="name an SDXL VAE",
        )


def _latent_channels(shapes: Shapes) -> int | None:
    for prefix in (kinds.VAE, ""):
        if (shape := shapes.get(f"{prefix}decoder.conv_in.weight")) is not None:
            return shape[1]
    return None


def _base_folder_faults(folder: Path, *, vae_given: bool) -> Iterator[Fault]:
    if not (folder / "model_index.json").is_file():
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        yield Fault(
            message=f"{folder.name} is a folder without model_index.json, so no diffusers model",
            remedy=f"name a file in it: {', '.join(files[:3])}" if files else "name the model",
        )
        return
    if kind := _other_kind_of_folder(folder):
        yield Fault(
            message=f"{folder.name} holds {kind}", remedy="name the folder of an SDXL base model"
        )
        return
    for subfolder, (title, stem) in PARTS.items():
        if subfolder == "vae" and vae_given:
            continue
        if (folder / subfolder / "config.json").is_file():
            yield from _weights_faults(folder / subfolder, title, stem)
        else:
            yield Fault(
                message=f"{folder.name} lacks its {title}: there is no {subfolder}/config.json",
                remedy="give one with --vae" if subfolder == "vae" else _COMPLETE,
            )
    read_json(folder / "scheduler" / "scheduler_config.json")  # raises if it is no JSON


def _other_kind_of_folder(folder: Path) -> str | None:
    """Say what a diffusers folder holds, if not the SDXL base model."""
    index = read_json(folder / "model_index.json")
    unet = read_json(folder / "unet" / "config.json")
    pipeline = index.get("_class_name", "an unknown pipeline")
    if not unet:
        return None if "XL" in pipeline else f"{pipeline}, which has no U-Net"
    if (channels := unet.get("in_channels")) != kinds.LATENT_CHANNELS:
        what = "an inpainting model" if channels == 9 else "a model"
        return f"{what} ({channels} input channels), not a text-to-image base model"
    if unet.get("addition_embed_type") != "text_time":
        version = "2.x" if unet.get("cross_attention_dim") == 1024 else "1.x"
        return f"a Stable Diffusion {version} model"
    is_refiner = index.get("requires_aesthetics_score") or unet.get("cross_attention_dim") == 1280
    return "the SDXL refiner, not the base model" if is_refiner else None


def _weights_faults(folder: Path, title: str, stem: str) -> Iterator[Fault]:
    """Yield what is wrong with the weight files of one part, told from their headers."""
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    if not files:
        pickled = next(folder.glob("*.bin"), None)
        where = f"{folder.parent.name}/{folder.name}"
        yield Fault(
            message=f"the {title} in {where} is a pickle ({pickled.name}), which is never unpickled"
            if pickled
            else f"the {title} in {where} has no weights ({stem}.safetensors)",
            remedy="convert it to .safetensors" if pickled else "download it again",
        )
    for file in files:
        try:
            read_header(file)
        except BadFileError as error:
            yield Fault(message=f"{title}: {error.fault.message}", remedy=error.fault.remedy)


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration; an absent file is an empty one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        place = f"{path.parent.name}/{path.name}"
        raise BadFileError(f"{place} is not valid JSON: {error}", "download it again") from error
    return content if isinstance(content, dict) else {}
