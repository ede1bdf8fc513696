"""SDXL's layers and what each is called in network files.

A layer's path is the one it has in single files: SGM's in the U-Net, transformers' in the text
encoders. The namings of files (reference: the sources of the programs that write them):

- ``kohya``: ``lora_unet_input_blocks_4_1_proj_in``, ``lora_te1_text_model_...``: what all read.
- ``kohya-diffusers``: the same with the U-Net's paths of diffusers.
- ``diffusers``: dots, ``unet.``, ``text_encoder.``, ``text_encoder_2.``, paths of diffusers.
- ``omi``: dots, ``unet.``, ``clip_l.`` and ``clip_g.``, paths of SGM.
- ``comfy``: dots, ``diffusion_model.`` and ``text_encoders.clip_l.transformer.``, paths of SGM.
- ``peft``: dots, ``base_model.model.`` and the U-Net's paths of diffusers: a U-Net alone.
- ``lycoris``: LyCORIS's wrapper: ``lycoris_`` and the U-Net's paths of diffusers, flat.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from sdxl_lora_plugins.model.names import UnetLayout, clip_path, sgm_to_unet, unet_to_sgm

PartName = Literal["unet", "te1", "te2"]
Naming = Literal["kohya", "kohya-diffusers", "diffusers", "omi", "comfy", "peft", "lycoris"]

_BLOCKS: Final = {
    path: name
    for path, name in UnetLayout(layers_per_block=2, attention=(False, True, True)).blocks().items()
    # The finest level has no transformers, though the table has names for them.
    if not re.match(
        r"(down_blocks\.0|up_blocks\.2)\.attentions|(down|up)_blocks\.2\..*samplers", path
    )
}
"""SDXL's resnets, transformers and samplers: from diffusers' names to SGM's."""

_SGM_LAYER: Final = re.compile(
    r"(time_embed\.[02]|label_emb\.0\.[02]|input_blocks\.0\.0|out\.[02])"
    r"|\w+\.\d+(\.\d+)?\.(in_layers\.[02]|out_layers\.[03]|emb_layers\.1|skip_connection|op|conv"
    r"|norm|proj_in|proj_out|transformer_blocks\.\d+\.(norm[123]|attn[12]\.(to_[qkv]|to_out\.0)"
    r"|ff\.net\.(0\.proj|2)))"
)
_CLIP_LAYER: Final = re.compile(
    r"text_projection|text_model\.(final_layer_norm|embeddings\.(token|position)_embedding"
    r"|encoder\.layers\.\d+\.(layer_norm[12]|self_attn\.([qkv]|out)_proj|mlp\.fc[12]))"
)
_WORD: Final = re.compile(
    r"(?:(input|middle|output|transformer|down|mid|up)_blocks?|time_embed(ding)?|label_emb"
    r"|(in|out|emb)_layers|skip_connection|proj_(in|out)|to_(q|k|v|out)|time_emb_proj"
    r"|conv_(shortcut|in|out|norm_out)|add_embedding|linear_[12]|text_(model|projection)"
    r"|self_attn|(q|k|v|out)_proj|(final_)?layer_norm[12]?|(token|position)_embedding"
    r"|[^_]+)(?=_|$)"
)
"""A name between two dots, where the dots are written as underscores."""

_PREFIXES: Final[tuple[tuple[str, PartName, Naming], ...]] = (
    ("lora_unet_", "unet", "kohya"),
    ("oft_unet_", "unet", "kohya"),
    ("lora_te1_", "te1", "kohya"),
    ("lora_te2_", "te2", "kohya"),
    ("lycoris_", "unet", "lycoris"),
    ("unet.", "unet", "diffusers"),
    ("text_encoder.", "te1", "diffusers"),
    ("text_encoder_2.", "te2", "diffusers"),
    ("clip_l.", "te1", "omi"),
    ("clip_g.", "te2", "omi"),
    ("diffusion_model.", "unet", "comfy"),
    ("text_encoders.clip_l.transformer.", "te1", "comfy"),
    ("text_encoders.clip_g.transformer.", "te2", "comfy"),
    ("base_model.model.", "unet", "peft"),
)
_FLAT: Final = ("kohya", "kohya-diffusers", "lycoris")


@dataclass(frozen=True, order=True)
class Layer:
    """A layer of SDXL.

    Attributes:
        part: ``unet``, ``te1`` or ``te2``.
        path: Its path in single files, without ``.weight``; text encoders as in transformers.
    """

    part: PartName
    path: str

    @property
    def kohya(self) -> str:
        """Its name in kohya's files, which is its name in this program: ``lora_unet_...``."""
        return f"lora_{self.part}_{self.path.replace('.', '_')}"

    @property
    def diffusers_path(self) -> str:
        """Its path within the module of diffusers or transformers."""
        return sgm_to_unet(self.path, _BLOCKS) if self.part == "unet" else self.path

    def name(self, naming: Literal["kohya", "diffusers", "omi"]) -> str:
        """Give its name in a file of a naming that this program writes."""
        if naming == "kohya":
            return self.kohya
        if naming == "omi":
            return f"{ {'unet': 'unet', 'te1': 'clip_l', 'te2': 'clip_g'}[self.part] }.{self.path}"
        part = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}[self.part]
        return f"{part}.{self.diffusers_path}"


def parse_layer(name: str) -> tuple[Layer, Naming] | None:
    """Tell which layer of SDXL a name in a file means, and in which naming; None for none."""
    for prefix, part, naming in _PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            path = ".".join(match[0] for match in _WORD.finditer(rest)) if naming in _FLAT else rest
            return _clip_layer(part, path, naming) if part != "unet" else _unet_layer(path, naming)
    return None


def _clip_layer(part: PartName, path: str, naming: Naming) -> tuple[Layer, Naming] | None:
    path = clip_path(path)
    return (Layer(part, path), naming) if _CLIP_LAYER.fullmatch(path) else None


def _unet_layer(path: str, naming: Naming) -> tuple[Layer, Naming] | None:
    is_sgm = path.startswith(
        ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
    )
    # The same prefix stands before both kinds of path.
    if naming == "kohya" and not is_sgm:
        naming = "kohya-diffusers"
    if naming == "diffusers" and is_sgm:
        naming = "omi"
    try:
        sgm = path if is_sgm else unet_to_sgm(path, _BLOCKS)
        sgm_to_unet(sgm, _BLOCKS)
    except KeyError:
        return None
    return (Layer("unet", sgm), naming) if _SGM_LAYER.fullmatch(sgm) else None
