"""Names of layers: in the modules of diffusers and transformers, and in single files.

Single files name the U-Net and the VAE after LDM (its successor SGM has the same names), and a text
encoder after transformers or OpenCLIP. All functions here rename paths, with or without a last
``.weight`` or ``.bias``; they know indices, never widths.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_UNET_STEM = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OLD_VAE_ATTENTION = {
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out.0": "proj_attn",
}
"""What diffusers called these layers before 0.17, in files that are still in use."""
_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_CLIP_STEM = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}


@dataclass(frozen=True, kw_only=True)
class UnetLayout:
    """What the indices in a U-Net's names depend on.

    Attributes:
        layers_per_block: Resnets of each level on the way down; one more on the way up.
        attention: For each level, from fine to coarse, whether it has transformers.
    """

    layers_per_block: int
    attention: Sequence[bool]

    def blocks(self) -> dict[str, str]:
        """Map each resnet, transformer and sampler from its diffusers to its SGM name."""
        blocks = {
            "mid_block.resnets.0": "middle_block.0",
            "mid_block.attentions.0": "middle_block.1",
            "mid_block.resnets.1": "middle_block.2",
        }
        num_levels = len(self.attention)
        for level in range(num_levels):
            down, first = f"down_blocks.{level}", 1 + level * (self.layers_per_block + 1)
            for layer in range(self.layers_per_block):
                blocks[f"{down}.resnets.{layer}"] = f"input_blocks.{first + layer}.0"
                blocks[f"{down}.attentions.{layer}"] = f"input_blocks.{first + layer}.1"
            sampler = first + self.layers_per_block
            blocks[f"{down}.downsamplers.0.conv"] = f"input_blocks.{sampler}.0.op"
        for level in range(num_levels):
            up, first = f"up_blocks.{level}", level * (self.layers_per_block + 1)
            for layer in range(self.layers_per_block + 1):
                blocks[f"{up}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
                blocks[f"{up}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
            # The upsampler follows in the list of the level's last layer.
            position = 2 if self.attention[num_levels - 1 - level] else 1
            sampler = first + self.layers_per_block
            blocks[f"{up}.upsamplers.0.conv"] = f"output_blocks.{sampler}.{position}.conv"
        return blocks

    def present_blocks(self) -> dict[str, str]:
        """Give those of :meth:`blocks` that are there: it has names for absent ones too."""
        last = len(self.attention) - 1
        absent = {f"down_blocks.{last}.downsamplers.0.conv", f"up_blocks.{last}.upsamplers.0.conv"}
        for level, attends in enumerate(self.attention):
            if not attends:
                absent |= {
                    f"down_blocks.{level}.attentions",
                    f"up_blocks.{last - level}.attentions",
                }
        return {
            path: name
            for path, name in self.blocks().items()
            if path not in absent and path.rpartition(".")[0] not in absent
        }


def unet_to_sgm(path: str, blocks: Mapping[str, str]) -> str:
    """Rename a path of diffusers' U-Net to SGM; ``blocks`` is from :class:`UnetLayout`."""
    return _rename(path, _UNET_STEM, blocks, _UNET_RESNET)


def sgm_to_unet(name: str, blocks: Mapping[str, str]) -> str:
    """Rename an SGM name to a path of diffusers' U-Net."""
    return _rename(name, _inverse(_UNET_STEM), _inverse(blocks), _inverse(_UNET_RESNET))


def vae_to_ldm(path: str, num_levels: int) -> str:
    """Rename a path of diffusers' VAE to LDM."""
    path = re.sub(
        r"^decoder\.up_blocks\.(\d+)\.",
        # LDM counts the decoder's levels from the fine end, diffusers from the coarse one.
        lambda match: f"decoder.up.{num_levels - 1 - int(match[1])}.",
        path,
    )
    path = re.sub(r"^encoder\.down_blocks\.", "encoder.down.", path)
    path = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", path)
    path = path.replace("mid_block.attentions.0", "mid.attn_1")
    path = path.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    path = path.replace(".resnets.", ".block.").replace("conv_shortcut", "nin_shortcut")
    path = path.replace("conv_norm_out", "norm_out")
    return _replace_part(path, ".attn_1.", _VAE_ATTENTION)


def vae_to_old_diffusers(path: str) -> str:
    """Rename a path of diffusers' VAE to what it was called before 0.17."""
    return _replace_part(path, ".attentions.0.", _OLD_VAE_ATTENTION)


def clip_path(path: str) -> str:
    """Give a path of a text encoder in the layout of files: ``text_model.encoder.layers.0...``.

    transformers dropped the first word from CLIPTextModel in 5.6; names in files keep it.
    """
    if path.startswith(("text_model.", "text_projection")):
        return path
    return f"text_model.{path}"


def clip_to_openclip(path: str) -> str:
    """Rename a path of transformers' CLIP to OpenCLIP.

    The three projections of an attention are one tensor there, ``attn.in_proj_weight``, so three
    paths get one name.
    """
    path = clip_path(path).removeprefix("text_model.")
    if path.startswith("text_projection"):
        return "text_projection"
    if not path.startswith("encoder.layers."):
        return next(path.replace(old, new) for old, new in _CLIP_STEM.items() if old in path)
    path = path.replace("encoder.layers.", "transformer.resblocks.")
    path = re.sub(r"self_attn\.[qkv]_proj\.(weight|bias)$", r"attn.in_proj_\1", path)
    for old, new in _CLIP_LAYER.items():
        path = path.replace(f".{old}.", f".{new}.")
    return path


def _rename(
    path: str, stem: Mapping[str, str], blocks: Mapping[str, str], layers: Mapping[str, str]
) -> str:
    """Rename by the stem's table, or by the block's and then the layer's."""
    words = path.split(".")
    for length in range(len(words), 0, -1):
        head, tail = ".".join(words[:length]), ".".join(words[length:])
        if head in stem:
            return _join(stem[head], tail)
        if head in blocks:
            for old, new in layers.items():
                if tail == old or tail.startswith(f"{old}."):
                    return f"{blocks[head]}.{new}{tail[len(old) :]}"
            return _join(blocks[head], tail)
    raise KeyError(path)


def _replace_part(path: str, marker: str, table: Mapping[str, str]) -> str:
    """Rename what follows ``marker``."""
    head, found, tail = path.partition(marker)
    for old, new in table.items():
        if tail == old or tail.startswith(f"{old}."):
            return f"{head}{found}{new}{tail[len(old) :]}"
    return path


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}


def _join(head: str, tail: str) -> str:
    return f"{head}.{tail}" if tail else head
