"""Configurations of a model's parts, read off the shapes in a single file.

Nothing is assumed about widths or depths, so a tiny model of the same topology loads too. What
shapes cannot tell is fixed: the number or the width of attention heads, normalisation in 32 groups.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

from sdxl_train.ldm.family import LATENT_CHANNELS, UNET, VAE
from sdxl_train.ldm.headers import BadFileError
from sdxl_train.ldm.names import UnetLayout

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sdxl_train.ldm.family import ClipEncoder, Family
    from sdxl_train.ldm.headers import Shapes

HEAD_WIDTH: Final = 64
NORM_GROUPS: Final = 32


def num_heads(width: int) -> int:
    """Give the heads of an attention: 64 wide each, or one where that does not divide."""
    return width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1


def norm_groups(widths: Iterable[int]) -> int:
    """Give the groups of a normalisation: 32, or what divides every width."""
    return math.gcd(NORM_GROUPS, *widths)


def layout_of(config: Any) -> UnetLayout:
    """Give what names depend on, from the configuration of a diffusers U-Net."""
    attention = ["CrossAttn" in block for block in config["down_block_types"]]
    return UnetLayout(layers_per_block=config["layers_per_block"], attention=attention)


def unet_config(shapes: Shapes, family: Family) -> dict[str, Any]:
    """Read the configuration of diffusers' U-Net off LDM shapes.

    Raises:
        BadFileError: If the blocks are not laid out as the family's.
    """
    unet = _below(shapes, UNET)
    samplers = _indices(unet, r"input_blocks\.(\d+)\.0\.op\.weight")
    num_blocks = len(_indices(unet, r"input_blocks\.(\d+)\."))
    layers_per_block = (samplers[0] if samplers else num_blocks) - 1
    firsts = [1, *(index + 1 for index in samplers)]
    widths = [_rows(unet, rf"input_blocks\.{first}\.0\.out_layers\.3\.") for first in firsts]
    depths = [_depth(unet, f"input_blocks.{first}.1") for first in firsts]
    middle = _depth(unet, "middle_block.1")
    _refuse_other_depths(unet, layers_per_block, depths, family)
    projections = [shape for name, shape in unet.items() if name.endswith(".1.proj_in.weight")]
    # diffusers keeps the number of heads under the name of their width.
    heads = [family.num_heads or num_heads(width) for width in widths]
    config = {
        "sample_size": 128,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": widths,
        "layers_per_block": layers_per_block,
        "down_block_types": [f"{'CrossAttn' if d else ''}DownBlock2D" for d in depths],
        "up_block_types": [f"{'CrossAttn' if d else ''}UpBlock2D" for d in reversed(depths)],
        # The middle is as deep as the coarsest level, or where that has none, by itself.
        "transformer_layers_per_block": [max(depth, 1) for depth in (*depths[:-1], middle)],
        "attention_head_dim": heads,
        "cross_attention_dim": _columns(unet, r".*\.attn2\.to_[kv]\.weight"),
        # Some families project by matrices, others by convolutions of one pixel.
        "use_linear_projection": all(len(shape) == 2 for shape in projections),
        "norm_num_groups": norm_groups(widths),
    }
    return {**config, **_pooled_config(shapes, family)} if family.pooled else config


def _pooled_config(shapes: Shapes, family: Family) -> dict[str, Any]:
    """Read what a U-Net has that is told a pooled text and six numbers: sizes and the crop."""
    vector_width = _columns(shapes, re.escape(f"{UNET}label_emb.0.0.weight"))
    key = next(encoder.key for encoder in family.text_encoders if encoder.projects)
    pooled_width = _columns(shapes, re.escape(f"{key}text_projection"))
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (vector_width - pooled_width) // 6,
        "projection_class_embeddings_input_dim": vector_width,
    }


def clip_config(shapes: Shapes, encoder: ClipEncoder) -> dict[str, Any]:
    """Read the configuration of a text encoder off shapes in transformers or OpenCLIP naming."""
    clip = _below(shapes, encoder.key)
    if encoder.naming == "openclip":
        return _openclip_config(clip, encoder)
    # Some files of old lack the first word.
    clip = _below(clip, "text_model.") or clip
    width = _columns(clip, r"embeddings\.(token|position)_embedding\.weight")
    return {
        "vocab_size": _rows(clip, r"embeddings\.token_embedding\.weight"),
        "max_position_embeddings": _rows(clip, r"embeddings\.position_embedding\.weight"),
        "num_hidden_layers": len(_indices(clip, r"encoder\.layers\.(\d+)\.")),
        "intermediate_size": _rows(clip, r"encoder\.layers\.\d+\.mlp\.fc1\."),
        "hidden_size": width,
        "num_attention_heads": num_heads(width),
        "projection_dim": width,
        "hidden_act": "quick_gelu",
    }


def _openclip_config(clip: Shapes, encoder: ClipEncoder) -> dict[str, Any]:
    width = _columns(clip, r"token_embedding\.weight|positional_embedding")
    layers = _indices(clip, r"transformer\.resblocks\.(\d+)\.")
    return {
        "vocab_size": _rows(clip, r"token_embedding\.weight"),
        "max_position_embeddings": _rows(clip, r"positional_embedding"),
        "num_hidden_layers": len(layers) - encoder.unused_layers,
        "intermediate_size": _rows(clip, r"transformer\.resblocks\.\d+\.mlp\.c_fc\."),
        "hidden_size": width,
        "num_attention_heads": num_heads(width),
        "projection_dim": _columns(clip, r"text_projection") if encoder.projects else width,
        "hidden_act": "gelu",
    }


def vae_config(shapes: Shapes, family: Family, prefix: str = VAE) -> dict[str, Any]:
    """Read the configuration of a VAE off shapes in LDM or diffusers naming."""
    vae = _below(shapes, prefix)
    is_ldm = any(name.startswith("encoder.down.") for name in vae)
    level, layer = (r"encoder\.down", "block") if is_ldm else (r"encoder\.down_blocks", "resnets")
    levels = _indices(vae, rf"{level}\.(\d+)\.")
    widths = [_rows(vae, rf"{level}\.{i}\.{layer}\.\d+\.conv[12]\.") for i in levels]
    layers = _indices(vae, rf"{level}\.0\.{layer}\.(\d+)\.")
    return {
        "sample_size": 1024,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": _columns(vae, r"decoder\.conv_in\.weight"),
        "block_out_channels": widths,
        "layers_per_block": len(layers),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "norm_num_groups": norm_groups(widths),
        "scaling_factor": family.latent_scaling,
    }


def _refuse_other_depths(
    unet: Shapes, layers_per_block: int, depths: Sequence[int], family: Family
) -> None:
    """Refuse transformers whose depth differs within a level, as in distilled models."""
    layout = UnetLayout(layers_per_block=layers_per_block, attention=[d > 0 for d in depths])
    for path, name in layout.blocks().items():
        half, index, kind = path.split(".")[:3]
        if half == "mid_block":
            kind, level = index, len(depths) - 1
        else:
            level = int(index) if half == "down_blocks" else len(depths) - 1 - int(index)
        if half == "mid_block" and not depths[level]:
            continue
        if kind == "attentions" and (found := _depth(unet, name)) != depths[level]:
            raise BadFileError(
                f"its U-Net is not built as that of {family.title}: {name} has {found} "
                f"transformer blocks where the level's first has {depths[level]}"
            )


def _depth(unet: Shapes, transformer: str) -> int:
    blocks = f"{transformer}.transformer_blocks."
    return len({name[len(blocks) :].partition(".")[0] for name in unet if name.startswith(blocks)})


def _indices(shapes: Shapes, pattern: str) -> list[int]:
    """Give the sorted distinct indices that a pattern finds at the start of names."""
    matches = map(re.compile(pattern).match, shapes)
    return sorted({int(match[1]) for match in matches if match})


def _rows(shapes: Shapes, pattern: str) -> int:
    """Give the first dimension of a tensor whose name matches."""
    return _first(shapes, pattern)[0]


def _columns(shapes: Shapes, pattern: str) -> int:
    """Give the second dimension of a tensor whose name matches."""
    return _first(shapes, pattern)[1]


def _first(shapes: Shapes, pattern: str) -> tuple[int, ...]:
    match = re.compile(pattern).match
    for name, shape in shapes.items():
        if match(name):
            return shape
    readable = pattern.replace("\\", "")
    raise BadFileError(f"it lacks the tensor {readable}", "download it again")


def _below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """Give the shapes under a prefix, without it."""
    return {
        name.removeprefix(prefix): shape
        for name, shape in shapes.items()
        if name.startswith(prefix)
    }
