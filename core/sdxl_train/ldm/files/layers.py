"""The layers of a family's models and what each is called in network files.

A layer's path is the one it has in single files: LDM's in the U-Net, transformers' in the text
encoders. The namings of files (reference: the sources of the programs that write them):

- ``kohya``: ``lora_unet_input_blocks_4_1_proj_in``, ``lora_te1_text_model_...``: what all read. The
  family says whether the U-Net's paths are LDM's or diffusers'.
- ``kohya-diffusers`` and ``kohya-ldm``: the same with the other paths of the U-Net.
- ``diffusers``: dots, ``unet.``, ``text_encoder.``, ``text_encoder_2.``, paths of diffusers.
- ``omi``: dots, ``unet.``, ``clip_l.`` and ``clip_g.``, paths of LDM.
- ``comfy``: dots, ``diffusion_model.`` and ``text_encoders.clip_l.transformer.``, paths of LDM.
- ``peft``: dots, ``base_model.model.`` and the U-Net's paths of diffusers: a U-Net alone.
- ``lycoris``: LyCORIS's wrapper: ``lycoris_`` and the U-Net's paths of diffusers, flat.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from sdxl_train.ldm.names import clip_path, sgm_to_unet, unet_to_sgm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.ldm.family import Family, Naming

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

_UNET_PREFIXES: Final[dict[str, Naming]] = {
    "lora_unet_": "kohya",
    "oft_unet_": "kohya",
    "lycoris_": "lycoris",
    "unet.": "diffusers",
    "diffusion_model.": "comfy",
    "base_model.model.": "peft",
}
_FLAT: Final = ("kohya", "lycoris")


@dataclass(frozen=True, order=True)
class Layer:
    """A layer of a family's models.

    Attributes:
        part: ``unet``, or the name of a text encoder.
        path: Its path in single files, without ``.weight``; text encoders as in transformers.
        family: Whose it is.
    """

    part: str
    path: str
    family: Family = field(compare=False, repr=False)

    @property
    def kohya(self) -> str:
        """Its name in kohya's files, which is its name in this program: ``lora_unet_...``."""
        if self.part != "unet":
            return f"{self._prefix('kohya')}{self.path.replace('.', '_')}"
        path = self.path if self.family.unet_naming == "ldm" else self.diffusers_path
        return f"lora_unet_{path.replace('.', '_')}"

    @property
    def diffusers_path(self) -> str:
        """Its path within the module of diffusers or transformers."""
        is_unet = self.part == "unet"
        return sgm_to_unet(self.path, self.family.unet_blocks) if is_unet else self.path

    def name(self, naming: Literal["kohya", "diffusers", "omi"]) -> str:
        """Give its name in a file of a naming that this program writes."""
        if naming == "kohya":
            return self.kohya
        path = self.diffusers_path if naming == "diffusers" else self.path
        return f"{'unet.' if self.part == 'unet' else self._prefix(naming)}{path}"

    def _prefix(self, naming: Naming) -> str:
        return self.family.encoder(self.part).files[naming]


def parse_layer(name: str, family: Family) -> tuple[Layer, Naming] | None:
    """Tell which layer of a family a name in a file means, and in which naming; None for none."""
    for prefix, part, naming in _prefixes(family):
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            path = ".".join(match[0] for match in _WORD.finditer(rest)) if naming in _FLAT else rest
            if part == "unet":
                return _unet_layer(path, naming, family)
            return _clip_layer(part, path, naming, family)
    return None


def _prefixes(family: Family) -> Iterator[tuple[str, str, Naming]]:
    yield from ((prefix, "unet", naming) for prefix, naming in _UNET_PREFIXES.items())
    for encoder in family.text_encoders:
        yield from ((prefix, encoder.name, naming) for naming, prefix in encoder.files.items())


def _clip_layer(
    part: str, path: str, naming: Naming, family: Family
) -> tuple[Layer, Naming] | None:
    path = clip_path(path)
    return (Layer(part, path, family), naming) if _CLIP_LAYER.fullmatch(path) else None


def _unet_layer(path: str, naming: Naming, family: Family) -> tuple[Layer, Naming] | None:
    is_ldm = path.startswith(
        ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
    )
    # The same prefix stands before both kinds of path.
    if naming == "kohya" and is_ldm != (family.unet_naming == "ldm"):
        naming = "kohya-ldm" if is_ldm else "kohya-diffusers"
    if naming == "diffusers" and is_ldm:
        naming = "omi"
    try:
        ldm = path if is_ldm else unet_to_sgm(path, family.unet_blocks)
        sgm_to_unet(ldm, family.unet_blocks)
    except KeyError:
        return None
    return (Layer("unet", ldm, family), naming) if _SGM_LAYER.fullmatch(ldm) else None
