"""Which layers of a model a network adapts, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from sdxl_lora_plugins.networks.blocks import block_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_lora_plugins.networks import BlockNetwork
    from sdxl_train import LoadedModel

ATTENTION_BLOCKS = frozenset({"Transformer2DModel", "CLIPAttention", "CLIPMLP"})
"""Classes whose linear layers and 1x1 convolutions LoRA adapts, as in sd-scripts."""
CONVOLUTION_BLOCKS = frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D"})
"""Classes whose layers are adapted too where convolutions are."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer to adapt.

    Attributes:
        name: Its name in files, with the part's prefix.
        part: Name of the part it belongs to.
        layer: ``nn.Linear`` or ``nn.Conv2d``.
        rank: Rank of its delta, at least 1.
        alpha: Its alpha; above 0.
        group: Name of the optimizer group of its parameters.
        lr_factor: Multiplies the part's learning rate.
    """

    name: str
    part: str
    layer: nn.Linear | nn.Conv2d
    rank: int
    alpha: float
    group: str
    lr_factor: float = 1.0


def targets(model: LoadedModel, options: BlockNetwork) -> Iterator[Target]:
    """Give the layers that the options choose in the parts that train, in model order."""
    classes = ATTENTION_BLOCKS | (CONVOLUTION_BLOCKS if options.adapts_convolutions else set())
    for part in model.parts:
        for path, layer in part.module.named_modules():
            if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                continue
            if not _is_inside(part.module, path, classes):
                continue
            file_name = part.file_names[path]
            block = block_of(file_name)
            has_kernel = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
            rank, alpha = options.rank_and_alpha(block, has_kernel=has_kernel)
            factor = options.lr_factor(block)
            if rank and factor:
                by_block = block is not None and options.has_lr_by_block
                yield Target(
                    name=f"{part.prefix}_{file_name}",
                    part=part.name,
                    layer=layer,
                    rank=rank,
                    # sd-scripts: an alpha of 0 stands for the rank.
                    alpha=alpha or float(rank),
                    group=f"{part.group}_block{block}" if by_block else part.group,
                    lr_factor=factor,
                )


def _is_inside(root: nn.Module, path: str, classes: frozenset[str]) -> bool:
    module = root
    for name in path.split("."):
        if type(module).__name__ in classes:
            return True
        module = module.get_submodule(name)
    return False
