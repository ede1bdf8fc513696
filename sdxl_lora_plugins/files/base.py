"""Weights of base models by layer, read one at a time from a single file or a diffusers folder."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from safetensors import safe_open

from sdxl_lora_plugins.model import SDXL
from sdxl_train.ldm import (
    UNET,
    BadFileError,
    Layer,
    Origin,
    clip_origin,
    kind_of,
    openclip_origin,
    parse_layer,
    read_header,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Any

    from torch import Tensor

_FOLDERS = {"unet": "unet", **{form.name: form.folder for form in SDXL.text_encoders}}
_TE1, _TE2 = (form.key for form in SDXL.text_encoders)


class BaseWeights:
    """The weights of an SDXL model; a context manager.

    Args:
        path: A single file, or a diffusers folder.

    Raises:
        BadFileError: If it is neither.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_folder = path.is_dir()
        self._open = ExitStack()
        self._files: dict[Path, Any] = {}
        self.places: dict[str, Path] = {}
        """The file of each tensor, by its name; in folders with the part's name in front."""
        if self.is_folder:
            for part, folder in _FOLDERS.items():
                for file in sorted((path / folder).glob("*.safetensors")):
                    self.places |= {f"{part}.{name}": file for name in read_header(file).shapes}
            if not self.places:
                raise BadFileError(f"{path.name} is a folder without an SDXL model in safetensors")
        else:
            shapes = read_header(path).shapes
            if (kind := kind_of(shapes, SDXL)) != SDXL.checkpoint:
                raise BadFileError(f"{path.name} is {kind}", f"name {SDXL.checkpoint}")
            self.places = dict.fromkeys(shapes, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def origin(self, layer: Layer, parameter: str = "weight") -> Origin | None:
        """Tell where a layer's weight or bias is; None if the model has no such layer."""
        if self.is_folder:
            paths = [f"{layer.diffusers_path}.{parameter}"]
            # transformers dropped the first word from text encoder 1 in 5.6.
            paths.append(paths[0].removeprefix("text_model."))
            found = (f"{layer.part}.{path}" for path in paths)
            return next((Origin(name=name) for name in found if name in self.places), None)
        if layer.part == "unet":
            origin = Origin(name=f"{UNET}{layer.path}.{parameter}")
        else:
            encoder = SDXL.encoder(layer.part)
            origin = openclip_origin(f"{layer.path}.{parameter}", encoder.key)
            if encoder.naming == "transformers":
                origin = clip_origin(f"{layer.path}.{parameter}", encoder.key, self.places)
        return origin if origin.name in self.places else None

    def weight(self, layer: Layer) -> Tensor | None:
        """Read a layer's weight in its stored dtype; None if the model has no such layer."""
        origin = self.origin(layer)
        return None if origin is None else origin.take(self.read(origin.name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a tensor by its name in :attr:`places`."""
        place = self.places[name]
        return read_header(place).shapes[name.removeprefix(self.prefix_of(place))]

    def prefix_of(self, file: Path) -> str:
        """Give what stands in :attr:`places` before the names in a file."""
        if not self.is_folder:
            return ""
        parts = {folder: part for part, folder in _FOLDERS.items()}
        return f"{parts[file.relative_to(self.path).parts[0]]}."

    def copy_others(self, folder: Path) -> None:
        """Copy everything of a diffusers folder but the weights in :attr:`places`."""
        weights = set(self.places.values())
        for source in self.path.rglob("*"):
            target = folder / source.relative_to(self.path)
            if source.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            elif source not in weights:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def read(self, name: str) -> Tensor:
        """Read a tensor by its name in :attr:`places`."""
        path = self.places[name]
        if path not in self._files:
            self._files[path] = self._open.enter_context(safe_open(path, framework="pt"))
        stored = name.partition(".")[2] if self.is_folder else name
        tensor: Tensor = self._files[path].get_tensor(stored)
        return tensor

    def layers(self) -> Iterator[Layer]:
        """Yield the linear layers and convolutions of U-Net and text encoders, sorted."""
        yield from sorted({layer for name in self.places for layer in self._layers_of(name)})

    def _layers_of(self, name: str) -> Iterator[Layer]:
        stored = name.partition(".")[2] if self.is_folder else name
        if len(read_header(self.places[name]).shapes[stored]) < 2:
            return
        path = name.removesuffix(".weight").removesuffix("_weight")
        if path == name and name != f"{_TE2}text_projection":
            return
        if self.is_folder:
            part, _, rest = path.partition(".")
            candidates = [f"{_FOLDERS[part]}.{rest}"]
        elif path.startswith(UNET):
            candidates = [f"unet.{path.removeprefix(UNET)}"]
        elif path.startswith(_TE1):
            candidates = [f"text_encoder.{path.removeprefix(_TE1)}"]
        elif path.startswith(_TE2):
            candidates = list(_openclip_layers(path.removeprefix(_TE2)))
        else:
            return
        for candidate in candidates:
            found = parse_layer(candidate, SDXL)
            if found and "norm" not in found[0].path and "embedding" not in found[0].path:
                yield found[0]


def _openclip_layers(path: str) -> Iterator[str]:
    """Give the names in transformers of what one tensor of OpenCLIP holds."""
    if path == "text_projection":
        yield "text_encoder_2.text_projection"
    block, _, rest = path.removeprefix("transformer.resblocks.").partition(".")
    layers = {
        "attn.in_proj": [f"self_attn.{letter}_proj" for letter in "qkv"],
        "attn.out_proj": ["self_attn.out_proj"],
        "mlp.c_fc": ["mlp.fc1"],
        "mlp.c_proj": ["mlp.fc2"],
    }
    for layer in layers.get(rest, ()):
        yield f"text_encoder_2.text_model.encoder.layers.{block}.{layer}"
