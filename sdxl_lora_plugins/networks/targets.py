"""Which layers of a model a network adapts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train import Part

ATTENTION_BLOCKS = frozenset({"Transformer2DModel", "CLIPAttention", "CLIPMLP"})
"""Classes whose linear layers and 1x1 convolutions LoRA adapts, as in sd-scripts."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer to adapt.

    Attributes:
        name: Its name in files, with the part's prefix.
        part: Name of the part it belongs to.
        layer: ``nn.Linear`` or ``nn.Conv2d``.
    """

    name: str
    part: str
    layer: nn.Linear | nn.Conv2d


def attention_targets(part: Part) -> Iterator[Target]:
    """Give the linear layers of a part's attention and feed-forward blocks, in model order."""
    for path, layer in part.module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and _is_inside(part.module, path):
            name = f"{part.prefix}_{part.file_names[path]}"
            yield Target(name=name, part=part.name, layer=layer)


def _is_inside(root: nn.Module, path: str) -> bool:
    module = root
    for name in path.split("."):
        if type(module).__name__ in ATTENTION_BLOCKS:
            return True
        module = module.get_submodule(name)
    return False
