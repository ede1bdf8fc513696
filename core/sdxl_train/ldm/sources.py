"""Sources of base models and VAEs: what a name stands for, and whether it can serve.

Reads headers and configurations only, asks no network and imports no torch.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sdxl_train.ldm import hub, kinds
from sdxl_train.ldm.family import LATENT_CHANNELS, VAE
from sdxl_train.ldm.headers import BadFileError, Fault, read_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.ldm.family import Family
    from sdxl_train.ldm.headers import Shapes

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


def base_faults(source: Source, family: Family, *, vae_given: bool) -> Iterator[Fault]:
    """Yield why what is here cannot serve as the base model."""
    try:
        if source.path is None or source.kind == "missing":
            yield from _absence(source)
        elif source.kind == "file":
            yield from _base_file_faults(source.path, family, vae_given=vae_given)
        else:
            yield from _base_folder_faults(source.path, family, vae_given=vae_given)
    except BadFileError as error:
        yield error.fault


def vae_faults(source: Source, family: Family) -> Iterator[Fault]:
    """Yield why what is here cannot serve as the VAE."""
    try:
        if source.path is None or source.kind == "missing":
            yield from _absence(source)
        elif source.kind == "file":
            yield from _vae_file_faults(source.path, family)
        elif folder := vae_folder(source.path):
            yield from _weights_faults(folder, *family.folders["vae"])
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


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Give the files of a part's weights: plain ones, else those of the variant ``fp16``.

    Raises:
        BadFileError: If there is an index of them, and it is broken.
    """
    for variant in ("", ".fp16"):
        if (file := folder / f"{stem}{variant}.safetensors").is_file():
            return [file]
        if (index := folder / f"{stem}.safetensors.index{variant}.json").is_file():
            homes = read_json(index).get("weight_map")
            if not isinstance(homes, dict) or not homes:
                raise BadFileError(f"{index.name} names no files of weights", "download it again")
            return [folder / Path(str(name)).name for name in sorted(set(homes.values()))]
    return []


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


def _base_file_faults(path: Path, family: Family, *, vae_given: bool) -> Iterator[Fault]:
    shapes = read_header(path, pickles=family.pickles).shapes
    kind = kinds.kind_of(shapes, family)
    if kind != family.checkpoint:
        remedy = _remedy(kind, family, f"name {family.checkpoint}")
        yield Fault(message=f"{path.name} is {kind}", remedy=remedy)
        return
    for part, remedy in kinds.missing_parts(shapes, family, vae_given=vae_given):
        yield Fault(message=f"{path.name} is {family.checkpoint} without its {part}", remedy=remedy)


def _vae_file_faults(path: Path, family: Family) -> Iterator[Fault]:
    shapes = read_header(path, pickles=family.pickles).shapes
    channels = _latent_channels(shapes)
    if channels is None:
        kind = kinds.kind_of(shapes, family)
        yield Fault(message=f"{path.name} is {kind}, without a VAE in it", remedy="name a VAE")
    elif channels != LATENT_CHANNELS:
        yield Fault(
            message=f"{path.name} is a VAE of {channels} latent channels (Flux and Stable "
            f"Diffusion 3 have 16); {family.title} needs {LATENT_CHANNELS}",
            remedy=f"name a VAE for {family.title}",
        )


def _latent_channels(shapes: Shapes) -> int | None:
    for prefix in (VAE, ""):
        if (shape := shapes.get(f"{prefix}decoder.conv_in.weight")) is not None:
            return shape[1]
    return None


def _base_folder_faults(folder: Path, family: Family, *, vae_given: bool) -> Iterator[Fault]:
    if not (folder / "model_index.json").is_file():
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        yield Fault(
            message=f"{folder.name} is a folder without model_index.json, so no diffusers model",
            remedy=f"name a file in it: {', '.join(files[:3])}" if files else "name the model",
        )
        return
    if kind := _other_kind_of_folder(folder, family):
        remedy = f"name the folder of {_as_model(family.checkpoint)}"
        yield Fault(
            message=f"{folder.name} holds {_as_model(kind)}",
            remedy=_remedy(kind, family, remedy),
        )
        return
    for subfolder, (title, stem) in family.folders.items():
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


def _other_kind_of_folder(folder: Path, family: Family) -> str | None:
    """Say what a diffusers folder holds, if not a base model of the family."""
    index = read_json(folder / "model_index.json")
    unet = read_json(folder / "unet" / "config.json")
    if not unet:
        pipeline = index.get("_class_name", "an unknown pipeline")
        return None if pipeline == family.pipeline else f"{pipeline}, which has no U-Net"
    kind = kinds.kind_of_unet(kinds.facts_of_config(unet), family)
    return None if kind == family.checkpoint else kind


def _remedy(kind: str, family: Family, usual: str) -> str:
    """Say what to do about another kind of model: some can be trained all the same."""
    model_type = family.model_types.get(kind)
    return usual if model_type is None else f"{usual}, or add --model_type {model_type}"


def _as_model(kind: str) -> str:
    """Say of a folder what is said of a file."""
    return kind.replace("checkpoint", "model")


def _weights_faults(folder: Path, title: str, stem: str) -> Iterator[Fault]:
    """Yield what is wrong with the weight files of one part, told from their headers."""
    files = weight_files(folder, stem)
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
