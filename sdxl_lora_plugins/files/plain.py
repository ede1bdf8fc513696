"""Plain LoRA files: factors by layer, in any naming that clients read.

A factor keeps its layer's kernel, as kohya and diffusers write it: ``down`` [r, in, k, k] and
``up`` [out, r, 1, 1]. For diffusers alpha / r is multiplied into ``up``, since its older versions
take every alpha for the rank; newer ones read ranks from ``lora_adapter_metadata``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import torch

from sdxl_lora_plugins.files.lowrank import Svd, of_matrix, of_product
from sdxl_train import TensorEntry, UserError, write_tensors
from sdxl_train.ldm import ADAPTER_METADATA, adapter_metadata, delta, factors, scale

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdxl_train.ldm import Layer, NetworkFile, StoredModule

OutputNaming = Literal["kohya", "diffusers", "omi"]

_CONV3: Final = re.compile(r"input_blocks\.0\.0|out\.2|.*\.(in_layers\.2|out_layers\.3|op|conv)")
_CONV1: Final = re.compile(r".*\.skip_connection")
_STALE: Final = (ADAPTER_METADATA, "modelspec.hash_sha256", "ot_branch")
"""Metadata that tells of the tensors of the file it was read from."""


@dataclass(frozen=True, kw_only=True)
class PlainModule:
    """The delta ``alpha / r * up @ down`` of one layer: [out, r], [r, in k k], fp32.

    Attributes:
        shape: Of the layer's weight.
    """

    layer: Layer
    shape: tuple[int, ...]
    up: Tensor
    down: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return len(self.down)

    @property
    def facts(self) -> PlainFacts:
        """What the metadata of a file says of it."""
        return PlainFacts(self.layer, self.shape, self.rank, self.alpha)

    def tensors(self, naming: OutputNaming, dtype: torch.dtype) -> dict[str, Tensor]:
        """Give the tensors of a file, by their names in it."""
        name = self.layer.name(naming)
        up = self.up * (self.alpha / self.rank) if naming == "diffusers" else self.up
        ones = [1] * (len(self.shape) - 2)
        up, down = up.reshape(*up.shape, *ones), self.down.reshape(-1, *self.shape[1:])
        # A view would keep all singular vectors of its layer in memory.
        up, down = up.to(dtype, copy=True), down.to(dtype, copy=True)
        if naming == "diffusers":
            return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        return {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(self.alpha, dtype=dtype),
        }


class PlainFacts(NamedTuple):
    """A module without its tensors."""

    layer: Layer
    shape: tuple[int, ...]
    rank: int
    alpha: float


def weight_shape(module: StoredModule, base: Tensor | None) -> tuple[int, ...]:
    """Give the shape of a layer's weight, with its kernel, where the file has it flat or not."""
    if base is not None:
        return tuple(base.shape)
    shape = module.weight_shape
    if shape is None:
        raise ValueError(f"{module.name}: {module.title} does not tell the shape of its weight")
    if len(shape) == 2 and module.layer.part == "unet":
        if is_wide(module.layer):
            return (shape[0], shape[1] // 9, 3, 3)
        if _CONV1.fullmatch(module.layer.path):
            return (*shape, 1, 1)
    return shape


def is_wide(layer: Layer) -> bool:
    """Tell whether a layer is a 3x3 convolution."""
    return layer.part == "unet" and _CONV3.fullmatch(layer.path) is not None


def stored(
    module: StoredModule, tensors: Mapping[str, Tensor], base: Tensor | None
) -> PlainModule | None:
    """Take the factors of a module as they are; None for everything but plain LoRA."""
    product = factors(module, tensors)
    if product is None:
        return None
    up, down = product
    rate = scale(module, tensors)
    if rate == 0 or "lora_mid.weight" in tensors:
        alpha = float(len(down))
    else:
        up, alpha = tensors["lora_up.weight"].float().flatten(1), rate * len(down)
    shape = weight_shape(module, base)
    return PlainModule(layer=module.layer, shape=shape, up=up, down=down, alpha=alpha)


def decompose(
    module: StoredModule,
    tensors: Mapping[str, Tensor],
    base: Tensor | None = None,
    rank: int | None = None,
) -> Svd:
    """Decompose a module's delta: exactly where it is a product, otherwise up to ``rank``."""
    product = factors(module, tensors)
    if product is not None:
        found = of_product(*product)
        return found if rank is None else found.cut(rank)
    matrix = delta(module, tensors, base)
    assert matrix is not None
    return of_matrix(matrix.flatten(1), rank)


def from_svd(layer: Layer, shape: tuple[int, ...], svd: Svd) -> PlainModule:
    """Make a module of a decomposition, with an alpha equal to its rank."""
    up, down = svd.factors()
    return PlainModule(layer=layer, shape=shape, up=up, down=down, alpha=float(len(down)))


def impossible(file: NetworkFile, *, has_base: bool) -> dict[str, list[str]]:
    """Name the layers of which no plain LoRA can be made, by the reason why not."""
    reasons: dict[str, list[str]] = {}
    for module in file.modules.values():
        if "diff_b" in module.shapes or module.algorithm == "norm":
            reasons.setdefault("a LoRA holds no deltas of biases and norms", []).append(module.name)
        elif module.needs_base and not has_base:
            reasons.setdefault(
                f"the delta of {module.title} needs the weights of the base model", []
            ).append(module.name)
    return reasons


def write_plain(
    path: Path,
    modules: Iterable[PlainModule],
    metadata: Mapping[str, str],
    *,
    naming: OutputNaming = "kohya",
    dtype: torch.dtype,
) -> list[PlainFacts]:
    """Write a LoRA; what is in memory is its tensors as they will be in the file.

    Args:
        path: The file.
        modules: Made one by one as they are taken.
        metadata: That of its origin; ranks and alphas in it are renewed.
        naming: Of the tensors.
        dtype: Of the tensors.

    Returns:
        What was written.

    Raises:
        UserError: If there is no module.
    """
    tensors: dict[str, Tensor] = {}
    facts: list[PlainFacts] = []
    for module in modules:
        tensors |= module.tensors(naming, dtype)
        facts.append(module.facts)
    if not facts:
        raise UserError.of("--save_to", f"nothing is left to write to {path}")
    entries = {
        name: TensorEntry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    write_tensors(path, entries, tensors.__getitem__, renewed(metadata, facts, naming))
    return facts


def renewed(
    metadata: Mapping[str, str], modules: Sequence[PlainFacts], naming: OutputNaming
) -> dict[str, str]:
    """Give metadata that is right for new modules."""
    kept = {name: text for name, text in metadata.items() if name not in _STALE}
    linear = [module for module in modules if prod(module.shape[2:]) == 1]
    wide = [module for module in modules if prod(module.shape[2:]) > 1]
    kept |= {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _common([module.rank for module in linear]),
        "ss_network_alpha": _common([_alpha(module, naming) for module in linear]),
    }
    if wide:
        conv_dim = _common([module.rank for module in wide])
        conv_alpha = _common([_alpha(module, naming) for module in wide])
        kept["ss_network_args"] = json.dumps({"conv_dim": conv_dim, "conv_alpha": conv_alpha})
    else:
        kept.pop("ss_network_args", None)
    if naming == "omi":
        # By these InvokeAI knows the naming.
        kept |= {"ot_branch": "omi_format", "modelspec.sai_model_spec": "1.0.0"}
        kept["modelspec.architecture"] = "stable-diffusion-xl-v1-base/lora"
    if naming == "diffusers":
        kept[ADAPTER_METADATA] = adapter_metadata({m.layer: m.rank for m in modules})
    return kept


def _alpha(module: PlainFacts, naming: OutputNaming) -> float:
    return module.rank if naming == "diffusers" else module.alpha


def _common(values: Sequence[float]) -> str:
    """Give the number that all share as text; ``Dynamic``, as sd-scripts has it, if they differ."""
    return str(values[0]) if len(set(values)) == 1 else "Dynamic"
