"""Which layers a preset of LyCORIS adapts.

Presets name classes of modules, as sd-scripts' U-Net and transformers have them. Their other
targets, by name (``conv_in``, ``time_embedding.linear_1``), are diffusers' names: in the U-Net of
sd-scripts, which files and users know, they hit nothing, and so they do here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycoris.config import PRESET
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train import LoadedModel, Part
    from sdxl_train_lycoris.networks import LycorisNetwork

CLASSES_IN_PRESETS = {
    "Attention": "CrossAttention",
    "CLIPAttention": "CLIPAttention",
    "CLIPMLP": "CLIPMLP",
    "Downsample2D": "Downsample2D",
    "ResnetBlock2D": "ResnetBlock2D",
    "Transformer2DModel": "Transformer2DModel",
    "Upsample2D": "Upsample2D",
}
"""What presets call the blocks of the models that diffusers and transformers build for SDXL.

Other classes are no targets: ``TimestepEmbedding`` in a preset is a block of another model.
"""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer to adapt.

    Attributes:
        name: Its name in files, with the part's prefix.
        part: Name of the part it belongs to.
        layer: The layer itself.
        rank: Rank of its delta.
        alpha: Its alpha; 0 means the rank.
    """

    name: str
    part: str
    layer: nn.Linear | nn.Conv2d
    rank: int
    alpha: float


def targets(model: LoadedModel, options: LycorisNetwork) -> Iterator[Target]:
    """Give the layers to adapt in the parts that train."""
    preset = PRESET[options.preset]
    conv_rank = options.conv_rank if preset["enable_conv"] else 0
    for part in model.parts:
        is_denoiser = part.module is model.denoiser
        classes = preset["unet_target_module" if is_denoiser else "text_encoder_target_module"]
        for path, layer in _layers_inside(part, frozenset(classes)):
            rank, alpha = options.rank, options.network_alpha
            if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
                rank, alpha = conv_rank, options.own_conv_alpha
            if rank:
                name = f"{part.prefix}_{part.file_names[path]}"
                yield Target(name=name, part=part.name, layer=layer, rank=rank, alpha=alpha)


def _layers_inside(
    part: Part, classes: frozenset[str]
) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Give the layers that stand in a block of one of the classes."""
    for path in part.file_names:
        module, inside = part.module, False
        for name in path.split("."):
            module = module.get_submodule(name)
            inside = inside or CLASSES_IN_PRESETS.get(type(module).__name__) in classes
        if inside and isinstance(module, (nn.Linear, nn.Conv2d)):
            yield path, module
