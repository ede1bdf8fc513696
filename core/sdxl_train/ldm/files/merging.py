"""Networks merged into the weights of a model: of one in memory, before it is trained."""

from __future__ import annotations

from contextlib import ExitStack
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from sdxl_train.errors import Problem, UserError
from sdxl_train.ldm.files.deltas import bias_delta, delta
from sdxl_train.ldm.files.opening import open_network
from sdxl_train.ldm.headers import counted
from sdxl_train.quantized import set_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdxl_train.ldm.family import Family
    from sdxl_train.ldm.files.network_file import NetworkFile, StoredModule
    from sdxl_train.protocols import Part


class Summand(NamedTuple):
    """What one file adds to a layer.

    Attributes:
        module: The delta.
        read: Gives its tensors.
        ratio: What it is multiplied by.
    """

    module: StoredModule
    read: Callable[[StoredModule], dict[str, Tensor]]
    ratio: float

    def add_to(self, total: Tensor, parameter: str, untouched: Tensor) -> None:
        """Add the delta to a sum in place, if there is one for this parameter.

        Args:
            total: The layer's weight or bias with what others add, fp32.
            parameter: ``weight`` or ``bias``.
            untouched: What ``total`` was without anything added.
        """
        tensors = self.read(self.module)
        if parameter == "weight":
            added = delta(self.module, tensors, untouched)
        else:
            added = bias_delta(tensors)
        if added is not None:
            total += self.ratio * added.reshape(total.shape)


def parameters_of(module: StoredModule) -> Iterator[str]:
    """Name what of a layer a module has deltas for."""
    if module.shapes.keys() - {"diff_b", "b_norm", "alpha"}:
        yield "weight"
    if module.shapes.keys() & {"diff_b", "b_norm"}:
        yield "bias"


def misfit(module: StoredModule, shape: Sequence[int]) -> str | None:
    """Say why a delta cannot be added to a weight of this shape; flat ones can."""
    own = module.weight_shape
    if own is None or (own[0], prod(own[1:])) == (shape[0], prod(shape[1:])):
        return None
    return f"{module.name} is for a weight {list(own)}, the base model's is {list(shape)}"


def merge_into(
    parts: Sequence[Part],
    networks: Sequence[tuple[Path, float]],
    family: Family,
    prepare: Callable[[nn.Module], None],
) -> None:
    """Add the deltas of networks' files, each times its multiplier, to the weights of a model.

    Each delta is that of the weights as they were, and their sum is rounded once, so the order of
    the files does not matter. On the meta device only what does not fit is told.

    Args:
        parts: All parts of the model.
        networks: Each file with its multiplier.
        family: What they should be for.
        prepare: Called with a part's module before a weight of it is changed.

    Raises:
        UserError: With everything that is wrong with the files.
    """
    homes = {f"{part.prefix}_{name}": part for part in parts for name in part.file_names.values()}
    layers = {
        f"{part.prefix}_{name}": part.module.get_submodule(path)
        for part in parts
        for path, name in part.file_names.items()
    }
    files = [(open_network(path, family), multiplier) for path, multiplier in networks]
    if problems := [problem for file, _ in files for problem in _misfits(file, layers)]:
        raise UserError(problems)
    with ExitStack() as opened:
        added: dict[str, list[Summand]] = {}
        for file, multiplier in files:
            read = opened.enter_context(file.weights())
            for module in file.modules.values():
                added.setdefault(module.name, []).append(Summand(module, read, multiplier))
        for part in {homes[name].name: homes[name] for name in added}.values():
            prepare(part.module)
        for name, summands in added.items():
            _merge(layers[name], summands)


def _misfits(file: NetworkFile, layers: Mapping[str, nn.Module]) -> Iterator[Problem]:
    """Yield what of a file does not fit the model."""
    absent = [name for name in file.modules if name not in layers]
    if absent:
        yield Problem(
            place=str(file.path),
            message=f"the base model has no {counted(absent, 'layer')}",
            remedy="merge a network for this model",
        )
    for name in file.modules.keys() & layers.keys():
        module, layer = file.modules[name], layers[name]
        if message := misfit(module, _parameter(layer, "weight").shape):
            yield Problem(
                place=str(file.path), message=message, remedy="merge a network for this model"
            )
        if "bias" in parameters_of(module) and getattr(layer, "bias", None) is None:
            yield Problem(
                place=str(file.path), message=f"{name} is for a bias, which the base model lacks"
            )


@torch.no_grad()
def _merge(layer: nn.Module, summands: Sequence[Summand]) -> None:
    if _parameter(layer, "weight").is_meta:
        return
    for name in sorted({name for one in summands for name in parameters_of(one.module)}):
        untouched = _parameter(layer, name).detach().float().cpu()
        total = untouched.clone()
        for one in summands:
            one.add_to(total, name, untouched)
        set_weight(layer, name, total.to(_parameter(layer, name)))


def _parameter(layer: nn.Module, name: str) -> Tensor:
    tensor = getattr(layer, name)
    assert isinstance(tensor, torch.Tensor)
    return tensor
