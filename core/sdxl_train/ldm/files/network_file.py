"""Files of LoRA-family networks: what is in them, without reading a weight.

``NetworkFile.open`` reads the header and tells for each layer its algorithm, rank and
shapes, whatever the naming of the file. What is wrong is told in one line each. Weights are read
layer by layer, through :meth:`NetworkFile.weights`.
"""

from __future__ import annotations

import fnmatch
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from sdxl_train.ldm.files import algorithms
from sdxl_train.ldm.files.layers import Layer, parse_layer
from sdxl_train.ldm.files.other_models import other_model
from sdxl_train.ldm.headers import PICKLED, BadFileError, Fault, counted, read_header
from sdxl_train.ldm.kinds import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from torch import Tensor

    from sdxl_train.ldm.family import Family, Naming
    from sdxl_train.ldm.files.algorithms import Algorithm
    from sdxl_train.ldm.headers import Shapes

ADAPTER_METADATA: Final = "lora_adapter_metadata"
"""Where diffusers keeps peft's configuration, as JSON."""

_IN_FOLDERS: Final = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
"""What diffusers calls a network in a folder of its own."""


@dataclass(frozen=True, kw_only=True)
class StoredModule:
    """The delta of one layer, as a file has it.

    Attributes:
        layer: Which layer.
        algorithm: How the delta is made of the tensors.
        shapes: Shapes by kohya's names of the tensors: ``lora_down.weight``, ``alpha``.
        keys: The names in the file, by the same.
        alpha: The alpha that the file's metadata gives instead of a tensor, if it does.
    """

    layer: Layer
    algorithm: Algorithm
    shapes: Shapes
    keys: Mapping[str, str]
    alpha: float | None = None

    @property
    def name(self) -> str:
        """Its name in kohya's naming."""
        return self.layer.kohya

    @property
    def block(self) -> str:
        """Its block as kohya names it: ``input_blocks.4``; of a text encoder the part."""
        if self.layer.part != "unet":
            return self.layer.part
        first, second, *_ = self.layer.path.split(".")
        return f"{first}.{second}" if first in ("input_blocks", "output_blocks") else first

    @property
    def rank(self) -> int | None:
        """The rank, or None where the delta has none."""
        return algorithms.rank_of(self.algorithm, self.shapes)

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        """The shape of the layer's weight, flat where the factors are; None if nothing tells."""
        return algorithms.weight_shape(self.algorithm, self.shapes)

    @property
    def is_dora(self) -> bool:
        """Whether the merged weight is given a norm of its own."""
        return "dora_scale" in self.shapes

    @property
    def dora_axis(self) -> Literal["input", "output"] | None:
        """Along which axis of the weight DoRA's norms are; None without DoRA."""
        return algorithms.dora_axis(self.algorithm, self.shapes)

    @property
    def needs_base(self) -> bool:
        """Whether the delta depends on the weight that it is added to."""
        return self.is_dora or self.algorithm in algorithms.NEEDS_BASE

    @property
    def title(self) -> str:
        """What it is, for people: ``LoRA``, ``LoCon (3x3)``, ``LoKr``, ``DoRA (LoKr)``."""
        title = algorithms.TITLES[self.algorithm]
        if self.algorithm == "lora" and any(size > 1 for size in (self.weight_shape or ())[2:]):
            title = "LoCon"
        if self.is_dora:
            return "DoRA" if title == "LoRA" else f"DoRA ({title})"
        return title


@dataclass(frozen=True, kw_only=True)
class NetworkFile:
    """A file of a network.

    Attributes:
        path: Where it is.
        family: What it is for.
        metadata: The header's metadata; empty for files that torch wrote.
        shapes: Shapes of all its tensors by their names in it.
        modules: What it holds for each layer, by the layer's name in kohya's naming.
        namings: The namings that its keys have; several in a mixed file.
        strangers: Keys that belong to no layer of the family.
        broken: What is wrong with layers, one line each, with the layer's name in the file.
    """

    path: Path
    family: Family
    metadata: Mapping[str, str]
    shapes: Shapes
    modules: Mapping[str, StoredModule]
    namings: tuple[Naming, ...]
    strangers: tuple[str, ...]
    broken: tuple[str, ...]

    @classmethod
    def open(cls, path: Path, family: Family) -> NetworkFile:
        """Read what a file holds, or the file of a folder as diffusers makes it.

        Raises:
            BadFileError: If it cannot be read, or no network for the family is in it; what is
                wrong with single layers is in :meth:`faults`.
        """
        if path.is_dir():
            path = _file_in(path)
        header = read_header(path, pickles=True)
        return _sorted_out(path, header.shapes, header.metadata, family)

    @classmethod
    def of_shapes(cls, shapes: Shapes, family: Family) -> NetworkFile:
        """Sort out the tensors of a network that is no file yet, by their names in one.

        Raises:
            BadFileError: If they are no network for the family.
        """
        return _sorted_out(Path("network"), shapes, {}, family)

    def faults(self) -> Iterator[Fault]:
        """Yield why this file cannot be used: broken layers, and keys that mean nothing here."""
        for text in self.broken[:_NUM_SHOWN]:
            yield Fault(message=f"{self.path.name}: {text}", remedy="download or train it again")
        if (more := len(self.broken) - _NUM_SHOWN) > 0:
            yield Fault(message=f"{self.path.name}: {more} more layers are broken")
        if self.strangers:
            yield Fault(
                message=f"{self.path.name} has keys that belong to no layer of "
                f"{self.family.title}, {counted(self.strangers)}",
                remedy="it may be for another model, or of an algorithm that is not known here",
            )

    def warnings(self) -> Iterator[str]:
        """Yield what is odd about this file, though it can be used."""
        scaled = [m for m in self.modules.values() if m.rank is not None]
        bare = [
            m.name
            for m in scaled
            if "alpha" not in m.shapes and m.alpha is None and m.algorithm not in ("oft", "boft")
        ]
        if bare and self.namings[0] not in ("diffusers", "peft"):
            layers = counted(bare, "layer")
            yield f"{self.path.name} has no alpha for {layers}; the rank is taken for it"
        if len(self.namings) > 1:
            yield f"{self.path.name} mixes the namings {' and '.join(self.namings)}"
        yield from _metadata_faults(self.path, self.metadata)

    @contextmanager
    def weights(self) -> Iterator[Callable[[StoredModule], dict[str, Tensor]]]:
        """Give a reader of one module's tensors, in their stored dtype, by kohya's names.

        An alpha that only the metadata has is among them. On the CPU; safetensors are mapped, so
        nothing stays in memory.
        """
        with _reader(self.path) as read:
            yield lambda module: _tensors_of(module, read)


_NUM_SHOWN: Final = 5


def _file_in(folder: Path) -> Path:
    """Find the network in a folder.

    Raises:
        BadFileError: If there is none.
    """
    found = next((folder / name for name in _IN_FOLDERS if (folder / name).is_file()), None)
    if found is None:
        raise BadFileError(
            f"{folder.name} is a folder without {' or '.join(_IN_FOLDERS)}", "name a file"
        )
    return found


def _tensors_of(module: StoredModule, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    tensors = {name: read(key) for name, key in module.keys.items()}
    if module.alpha is not None:
        tensors["alpha"] = tensors["lora_down.weight"].new_tensor(module.alpha)
    return tensors


@contextmanager
def _reader(path: Path) -> Iterator[Callable[[str], Tensor]]:
    if path.suffix.lower() in PICKLED:
        from sdxl_train.ldm.pickled import read_tensors

        yield read_tensors(path).__getitem__
        return
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        yield file.get_tensor


def _sorted_out(
    path: Path, shapes: Shapes, metadata: Mapping[str, str], family: Family
) -> NetworkFile:
    """Group the keys by layer and name what is wrong."""
    layers: dict[Layer, dict[str, str]] = {}
    names: dict[Layer, str] = {}
    namings: dict[Naming, int] = {}
    strangers: list[str] = []
    broken: list[str] = []
    for key in shapes:
        split = algorithms.split_key(key) or _ia3_key(key, shapes)
        found = parse_layer(split[0], family) if split else None
        if split is None or found is None:
            strangers.append(key)
            continue
        layer, naming = found
        namings[naming] = namings.get(naming, 0) + 1
        names.setdefault(layer, split[0])
        if split[1] in layers.setdefault(layer, {}):
            broken.append(f"{key} stands for the same tensor as {layers[layer][split[1]]}")
        layers[layer][split[1]] = key
    if not layers:
        _refuse_other_model(path, shapes, (), metadata, family)
        raise BadFileError(
            f"{path.name} is {kind_of(shapes, family)}", f"name a network for {family.title}"
        )
    modules = {}
    for layer, keys in layers.items():
        module = _module(layer, keys, shapes, names[layer], broken)
        if module is not None:
            modules[layer.kohya] = module
    contexts = {
        shape[1]
        for module in modules.values()
        if re.search(r"attn2\.to_[kv]$", module.layer.path) and (shape := module.weight_shape)
    }
    _refuse_other_model(path, shapes, contexts, metadata, family)
    alphas = _AdapterAlphas(metadata)
    return NetworkFile(
        path=path,
        family=family,
        metadata=metadata,
        shapes=shapes,
        modules={name: alphas.put_into(module) for name, module in modules.items()},
        namings=tuple(sorted(namings, key=lambda naming: -namings[naming])),
        strangers=tuple(strangers),
        broken=tuple(broken),
    )


def _ia3_key(key: str, shapes: Shapes) -> tuple[str, str] | None:
    """(IA)^3 calls its vector ``weight``, as everything else does; ``on_input`` tells it apart."""
    name = key.removesuffix(".weight")
    return (name, "weight") if f"{name}.on_input" in shapes and name != key else None


def _module(
    layer: Layer, keys: Mapping[str, str], shapes: Shapes, name: str, broken: list[str]
) -> StoredModule | None:
    own = {suffix: shapes[key] for suffix, key in keys.items()}
    algorithm = algorithms.algorithm_of(own)
    if algorithm is None:
        broken.append(f"{name} has only {' and '.join(sorted(own))}, which is no delta")
        return None
    wrong = list(algorithms.shape_faults(algorithm, own))
    if wrong:
        broken.append(f"{name}: {wrong[0]}")
        return None
    return StoredModule(layer=layer, algorithm=algorithm, shapes=own, keys=keys)


def _refuse_other_model(
    path: Path,
    shapes: Shapes,
    contexts: Collection[int],
    metadata: Mapping[str, str],
    family: Family,
) -> None:
    if other := other_model(shapes, contexts, metadata, family):
        raise BadFileError(
            f"{path.name} is a network for {other}, not for {family.title}",
            f"name a network for {family.title}",
        )


def _metadata_faults(path: Path, metadata: Mapping[str, str]) -> Iterator[str]:
    for name in ("ss_network_args", "ss_tag_frequency", "ss_datasets", ADAPTER_METADATA):
        if name in metadata and _json(metadata[name]) is None:
            yield f"{path.name}: its metadata {name} is not JSON and is ignored"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


class _AdapterAlphas:
    """The alphas that diffusers keeps in the metadata, by part and layer."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        content = _json(metadata.get(ADAPTER_METADATA, "{}"))
        self._content: dict[str, Any] = content if isinstance(content, dict) else {}

    def put_into(self, module: StoredModule) -> StoredModule:
        """Give a module the alpha of the metadata, if its file has none for it."""
        if module.algorithm != "lora" or "alpha" in module.shapes or not self._content:
            return module
        layer = module.layer
        part = layer.part
        prefix = "unet." if part == "unet" else layer.family.encoder(part).files["diffusers"]
        default = self._content.get(f"{prefix}lora_alpha")
        patterns = self._content.get(f"{prefix}alpha_pattern") or {}
        path = layer.diffusers_path
        # peft: a pattern is the end of the layer's path, as a regular expression.
        alpha = next((a for p, a in patterns.items() if _names(p, path)), default)
        rank = module.rank
        if not isinstance(alpha, (int, float)) or rank is None:
            return module
        if self._content.get(f"{prefix}use_rslora"):
            alpha = alpha * rank**0.5
        return StoredModule(
            layer=layer,
            algorithm=module.algorithm,
            shapes=module.shapes,
            keys=module.keys,
            alpha=float(alpha),
        )


def _names(pattern: str, path: str) -> bool:
    return fnmatch.fnmatch(path, f"*{pattern}") or bool(re.match(rf"(.*\.)?({pattern})$", path))
