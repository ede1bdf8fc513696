"""Presets: which layers are adapted and how, by LyCORIS's names or by a TOML file.

The library keeps the preset in use as attributes of a class, shared by the process. Here a preset
is a value that belongs to one network.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from sdxl_train import UserError, read_toml

BuiltinPreset = Literal[
    "full",
    "full-lin",
    "attn-mlp",
    "attn-only",
    "unet-only",
    "unet-transformer-only",
    "unet-convblock-only",
    "ia3",
]
BUILTIN_PRESETS: Final[tuple[str, ...]] = get_args(BuiltinPreset)
LINEAR_PRESETS: Final = frozenset(
    {"full-lin", "attn-mlp", "attn-only", "unet-transformer-only", "ia3"}
)
"""Presets that leave out convolutions larger than 1x1."""

_TEXT_ENCODER: Final = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
_UNET: Final = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")


class Preset(BaseModel):
    """Which layers are adapted.

    Blocks are named by their class in sd-scripts' U-Net and in transformers. Layers are named by
    their paths there, in SGM's naming, as regular expressions that fit the beginning of the path
    or of a part of it (``to_k``); with ``use_fnmatch`` as globs for the whole path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    enable_conv: bool = True
    """Whether convolutions larger than 1x1 are adapted."""
    unet_target_module: tuple[str, ...] = _UNET
    unet_target_name: tuple[str, ...] = ()
    text_encoder_target_module: tuple[str, ...] = _TEXT_ENCODER
    text_encoder_target_name: tuple[str, ...] = ()
    module_algo_map: dict[str, dict[str, Any]] = {}
    """Options of layers in blocks of a class: ``algo``, ``dim``, ``alpha`` and the algorithm's."""
    name_algo_map: dict[str, dict[str, Any]] = {}
    """The same for layers by name."""
    use_fnmatch: bool = False
    exclude_name: tuple[str, ...] = ()

    def fits(self, pattern: str, name: str) -> bool:
        """Tell whether a pattern means a layer or block.

        Args:
            pattern: Written with dots; a dot fits an underscore.
            name: The name in files without the part's prefix.
        """
        if self.use_fnmatch:
            return fnmatch.fnmatchcase(name, pattern.replace(".", "_"))
        plain = pattern.replace(r"\.", "_")
        return bool(re.match(plain, name) or re.search(rf"(^|_)({plain})$", name))

    def names(self, *, is_denoiser: bool) -> tuple[str, ...]:
        """Give the names of layers to adapt in a part."""
        return self.unet_target_name if is_denoiser else self.text_encoder_target_name

    def classes(self, *, is_denoiser: bool) -> tuple[str, ...]:
        """Give the classes of blocks to adapt in a part."""
        return self.unet_target_module if is_denoiser else self.text_encoder_target_module


_INPUT: Final = {"train_on_input": True}
_BUILTIN: Final[dict[str, Preset]] = {
    "full": Preset(),
    "full-lin": Preset(
        enable_conv=False, unet_target_module=("Transformer2DModel", "ResnetBlock2D")
    ),
    "attn-mlp": Preset(enable_conv=False, unet_target_module=("Transformer2DModel",)),
    "attn-only": Preset(
        enable_conv=False,
        unet_target_module=("CrossAttention", "SelfAttention"),
        text_encoder_target_module=("CLIPAttention", "CLIPSdpaAttention"),
    ),
    "unet-only": Preset(text_encoder_target_module=()),
    "unet-transformer-only": Preset(
        enable_conv=False,
        unet_target_module=("Transformer2DModel",),
        text_encoder_target_module=(),
    ),
    "unet-convblock-only": Preset(
        unet_target_module=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
        text_encoder_target_module=(),
    ),
    "ia3": Preset(
        enable_conv=False,
        unet_target_module=(),
        unet_target_name=("to_k", "to_v", "ff.net.2"),
        text_encoder_target_module=(),
        text_encoder_target_name=("k_proj", "v_proj", "mlp.fc2"),
        name_algo_map={"mlp.fc2": _INPUT, "ff.net.2": _INPUT},
    ),
}
"""LyCORIS's presets, as far as they mean SDXL.

They name more: blocks of other models, and layers by diffusers' names (``conv_in``), which hit
nothing in the U-Net of sd-scripts. The names of ``ia3`` hit nothing there either, by a fault of
the library; here they do what they say.
"""


def read_preset(name: str) -> Preset:
    """Give a preset of LyCORIS by name, or read a file.

    Raises:
        UserError: If there is no such preset, or something is wrong with the file.
    """
    if name in _BUILTIN:
        return _BUILTIN[name]
    path = Path(name).expanduser()
    if path.suffix != ".toml" and not path.exists():
        raise UserError.of(
            "preset",
            f"'{name}' is neither a preset nor a file",
            f"write one of {', '.join(BUILTIN_PRESETS)}, or the path of a .toml file",
        )
    document, lines = read_toml(path)
    try:
        return Preset(**document)
    except ValidationError as error:
        fault = error.errors()[0]
        place = tuple(fault["loc"])
        line = lines.get(place) or lines.get(place[:1])
        known = ", ".join(Preset.model_fields)
        unknown = fault["type"] == "extra_forbidden"
        raise UserError.of(
            f"{path}:{line}" if line else str(path),
            f"'{'.'.join(map(str, place))}' is no key of a preset for SDXL"
            if unknown
            else f"{'.'.join(map(str, place))}: {fault['msg']}",
            f"the keys are {known}" if unknown else "",
        ) from None
