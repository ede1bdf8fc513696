"""Which layers of a model a network adapts, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from sdxl_lora_plugins.networks.rules import last_match, require_matches
from sdxl_train.ldm import algorithm_of, rank_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from sdxl_lora_plugins.networks import BlockNetwork
    from sdxl_lora_plugins.networks.block_network import ValuesByBlock
    from sdxl_train import LoadedModel, Part

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
        lr: Their learning rate; None stands for the optimizer's.
        lr_factor: Multiplies the learning rate.
    """

    name: str
    part: str
    layer: nn.Linear | nn.Conv2d
    rank: int
    alpha: float
    group: str
    lr: float | None = None
    lr_factor: float = 1.0


def targets(model: LoadedModel, options: BlockNetwork) -> Iterator[Target]:
    """Give the layers that the options choose in the parts that train, in model order.

    Raises:
        UserError: If options are about parts that do not train, or a rule about no layer of them.
    """
    _require_use(model, options)
    stored = None
    if options.dim_from_weights and options.network_weights is not None:
        stored = ranks_and_alphas(model.read_network(options.network_weights))
    classes = ATTENTION_BLOCKS | (CONVOLUTION_BLOCKS if options.adapts_convolutions else set())
    for part in model.parts:
        values = options.by_block(tuple(part.blocks))
        block_of = {path: block for block, paths in part.blocks.items() for path in paths}
        for path, layer in part.module.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                standard = _is_inside(part.module, path, classes)
                target = _target(
                    part,
                    part.file_names[path],
                    layer,
                    options,
                    stored,
                    block=block_of.get(path),
                    values=values,
                    standard=standard,
                )
                if target is not None:
                    yield target


def ranks_and_alphas(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, float]]:
    """Give the rank and alpha of each layer of a file, as ``LoadedModel.read_network`` reads it.

    Of a LoKr of whole factors it is a rank that leaves both whole.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.partition(".")
        shapes.setdefault(name, {})[kind] = tuple(tensor.shape)
    found: dict[str, tuple[int, float]] = {}
    for name, own in shapes.items():
        algorithm = algorithm_of(own)
        assert algorithm is not None
        rank = rank_of(algorithm, own)
        if rank is None:
            rank = max(size for shape in own.values() for size in shape)
        alpha = tensors.get(f"{name}.alpha")
        found[name] = (rank, float(rank) if alpha is None else alpha.item())
    return found


def _require_use(model: LoadedModel, options: BlockNetwork) -> None:
    trained = [part.module for part in model.parts]
    options.require_parts(
        denoiser=any(module is model.denoiser for module in trained),
        text_encoders=any(module is not model.denoiser for module in trained),
    )
    if options.rules:
        names = (
            f"{part.prefix}_{name}"
            for part in model.parts
            for path, name in part.file_names.items()
            if isinstance(part.module.get_submodule(path), (nn.Linear, nn.Conv2d))
        )
        require_matches(options.rules, names)


def _target(
    part: Part,
    file_name: str,
    layer: nn.Linear | nn.Conv2d,
    options: BlockNetwork,
    stored: Mapping[str, tuple[int, float]] | None,
    *,
    block: str | None,
    values: ValuesByBlock,
    standard: bool,
) -> Target | None:
    """Give how a layer is adapted; None if it is not.

    Args:
        part: The part that it is in.
        file_name: Its name in files without the part's prefix.
        layer: The layer.
        options: What is asked for.
        stored: Rank and alpha of the layers of a file, if that decides on them.
        block: The block that it is in, if any.
        values: What the options say of blocks.
        standard: Whether its class is one that is adapted where no rule says otherwise.
    """
    name = f"{part.prefix}_{file_name}"
    has_kernel = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
    if stored is None:
        rank, alpha = options.rank_and_alpha(block, values, has_kernel=has_kernel)
    else:
        rank, alpha = stored.get(name, (0, 0.0))
        standard = bool(rank)
    factor, lr = values.lr_factor(block), part.lr
    group = part.group
    if block is not None and options.has_lr_by_block:
        group = f"{part.group}_block{values.names.index(block)}"
    index = last_match(options.rules or (), name)
    if index is not None:
        rule = (options.rules or ())[index]
        if rule.excludes:
            return None
        standard = standard or rule.include
        rank = rule.dim or rank or (options.rank if rule.include else 0)
        alpha = alpha if rule.alpha is None else rule.alpha
        if rule.lr is not None:
            # A rate of its own: neither the part's nor the block's counts.
            group, lr, factor = f"{part.group}_rule{index + 1}", rule.lr, 1.0
    if not (standard and rank and factor):
        return None
    return Target(
        name=name,
        part=part.name,
        layer=layer,
        rank=rank,
        # sd-scripts: an alpha of 0 stands for the rank.
        alpha=alpha or float(rank),
        group=group,
        lr=lr,
        lr_factor=factor,
    )


def _is_inside(root: nn.Module, path: str, classes: frozenset[str]) -> bool:
    module = root
    for name in path.split("."):
        if type(module).__name__ in classes:
            return True
        module = module.get_submodule(name)
    return False
