"""Which layers a preset of LyCORIS adapts, and with what."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from sdxl_train import UserError
from sdxl_train_lycoris.blocks import values_by_block
from sdxl_train_lycoris.options import RankOptions, ScaledOptions
from sdxl_train_lycoris.overrides import overridden
from sdxl_train_lycoris.presets import BUILTIN_PRESETS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from sdxl_train import LoadedModel, Part
    from sdxl_train_lycoris.options import LycorisNetwork
    from sdxl_train_lycoris.presets import Preset

Layer: TypeAlias = "nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm"

_log = logging.getLogger(__name__)

CLASSES_IN_PRESETS = {
    "Attention": "CrossAttention",
    "BasicTransformerBlock": "BasicTransformerBlock",
    "CLIPAttention": "CLIPAttention",
    "CLIPEncoderLayer": "CLIPEncoderLayer",
    "CLIPMLP": "CLIPMLP",
    "Conv2d": "Conv2d",
    "Downsample2D": "Downsample2D",
    "FeedForward": "FeedForward",
    "GEGLU": "GEGLU",
    "Linear": "Linear",
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
        options: The options that count for it.
        rank: Rank of its delta; 0 where the algorithm has none.
        alpha: Its alpha; 0 means the rank.
    """

    name: str
    part: str
    layer: Layer
    options: LycorisNetwork
    rank: int
    alpha: float


def targets(model: LoadedModel, options: LycorisNetwork) -> Iterator[Target]:
    """Give the layers to adapt in the parts that train.

    Raises:
        UserError: If options by block are given and the U-Net does not train.
    """
    preset = options.layers
    _require_use(model, options)
    stored = None
    if isinstance(options, ScaledOptions) and options.dim_from_weights:
        assert options.network_weights is not None
        stored = _ranks_and_alphas(model.read_network(options.network_weights))
    if options.preset not in BUILTIN_PRESETS:
        _warn_of_idle(model, preset)
    for part in model.parts:
        is_denoiser = part.module is model.denoiser
        block_of = {path: block for block, paths in part.blocks.items() for path in paths}
        for path, file_name in part.file_names.items():
            override = _override(part, path, preset, is_denoiser=is_denoiser)
            if override is None:
                continue
            own = overridden(options, override) if override else options
            layer: Any = part.module.get_submodule(path)
            name = f"{part.prefix}_{file_name}"
            found = _rank_and_alpha(layer, own, preset, block_of.get(path), tuple(part.blocks))
            if found is not None and stored is not None and not isinstance(layer, _NORMS):
                found = stored.get(name)
            if found is not None:
                rank, alpha = found
                yield Target(
                    name=name, part=part.name, layer=layer, options=own, rank=rank, alpha=alpha
                )


_NORMS = (nn.GroupNorm, nn.LayerNorm)


def _override(
    part: Part, path: str, preset: Preset, *, is_denoiser: bool
) -> Mapping[str, Any] | None:
    """Give the preset's own options for a layer, empty where it has none; None to leave it out."""
    name = part.file_names[path]
    if any(preset.fits(pattern, name) for pattern in preset.exclude_name):
        return None
    if any(preset.fits(pattern, name) for pattern in preset.names(is_denoiser=is_denoiser)):
        fits = (own for key, own in preset.name_algo_map.items() if preset.fits(key, name))
        return next(fits, {})
    targeted, found = set(preset.classes(is_denoiser=is_denoiser)), None
    module = part.module
    for word in path.split("."):
        module = module.get_submodule(word)
        kind = CLASSES_IN_PRESETS.get(type(module).__name__)
        if found is None and kind in targeted:
            found = preset.module_algo_map.get(str(kind), {})
        elif found is not None and kind in preset.module_algo_map:
            # The innermost block that has options of its own counts.
            found = preset.module_algo_map[str(kind)]
    return found


def _rank_and_alpha(
    layer: Layer,
    options: LycorisNetwork,
    preset: Preset,
    block: str | None,
    blocks: Sequence[str],
) -> tuple[int, float] | None:
    """Give rank and alpha of a layer; None to leave it out."""
    if isinstance(layer, _NORMS):
        return (0, 0.0) if options.train_norm else None
    has_kernel = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
    if has_kernel and not preset.enable_conv:
        return None
    if not isinstance(options, RankOptions):
        return 0, 0.0
    ranks = options.conv_block_dims if has_kernel else options.block_dims
    rank = _value_of(ranks, block, blocks)
    if rank is None:
        rank = options.conv_rank if has_kernel else options.rank
    if not rank:
        return None
    if not isinstance(options, ScaledOptions):
        return int(rank), 0.0
    alphas = options.conv_block_alphas if has_kernel else options.block_alphas
    alpha = _value_of(alphas, block, blocks)
    if alpha is None:
        alpha = options.network_alpha
        if has_kernel and options.conv_alpha is not None:
            alpha = options.conv_alpha
    return int(rank), alpha


def _value_of(
    values: Sequence[float | None] | Mapping[str, float] | None,
    block: str | None,
    blocks: Sequence[str],
) -> float | None:
    """Give the value of a block; None where nothing was said of it."""
    return None if block is None else values_by_block(values, blocks).get(block)


def _require_use(model: LoadedModel, options: LycorisNetwork) -> None:
    """Refuse options by block where the U-Net does not train; warn of idle LoRA+ ratios."""
    trained = {part.module is model.denoiser for part in model.parts}
    for is_denoiser, name in (
        (True, "loraplus_unet_lr_ratio"),
        (False, "loraplus_text_encoder_lr_ratio"),
    ):
        if getattr(options, name, None) is not None and is_denoiser not in trained:
            _log.warning("--network_args %s has no effect: no part of that trains", name)
    if True in trained:
        return
    for name in options.block_options if isinstance(options, RankOptions) else ():
        if getattr(options, name) is not None:
            raise UserError.of(
                f"--network_args {name}",
                "is about the U-Net, and no part of that trains",
                "leave it out, or train that part",
            )


def _warn_of_idle(model: LoadedModel, preset: Preset) -> None:
    """Name what a preset of one's own has for layers that are not there."""
    for is_denoiser, where in ((True, "U-Net"), (False, "text encoders")):
        parts = [part for part in model.parts if (part.module is model.denoiser) == is_denoiser]
        if not parts:
            continue
        names = {name for part in parts for name in part.file_names.values()}
        there = {type(module).__name__ for part in parts for module in part.module.modules()}
        kinds = {CLASSES_IN_PRESETS.get(kind) for kind in there}
        idle = [kind for kind in preset.classes(is_denoiser=is_denoiser) if kind not in kinds]
        idle += [
            pattern
            for pattern in preset.names(is_denoiser=is_denoiser)
            if not any(preset.fits(pattern, name) for name in names)
        ]
        known = {"CLIPSdpaAttention"}
        if idle := [name for name in idle if name not in known]:
            _log.warning("preset: nothing in the %s is %s", where, ", ".join(idle))


def _ranks_and_alphas(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, float]]:
    """Give the rank and alpha of each layer of a file, as ``LoadedModel.read_network`` reads it."""
    # Their first dimension is the rank.
    kinds = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2.weight")
    found: dict[str, tuple[int, float]] = {}
    for name in {key.partition(".")[0] for key in tensors}:
        factors = [tensors[key] for kind in kinds if (key := f"{name}.{kind}") in tensors]
        # Whole factors have none: a rank that leaves them whole.
        rank = len(factors[0]) if factors else 10**5
        alpha = tensors.get(f"{name}.alpha")
        found[name] = (rank, float(rank) if alpha is None else alpha.item())
    return found
