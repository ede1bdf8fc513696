"""Networks merged into a model in memory, before it is trained."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sdxl_lora_plugins.files.deltas import bias_delta, delta
from sdxl_lora_plugins.files.opening import open_network
from sdxl_lora_plugins.model.headers import counted
from sdxl_train import Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdxl_lora_plugins.files.network_file import NetworkFile, StoredModule
    from sdxl_train import Part


@dataclass(frozen=True, kw_only=True)
class _Added:
    """What one file adds to a layer."""

    module: StoredModule
    read: Callable[[StoredModule], dict[str, Tensor]]
    multiplier: float
    path: Path


def merge_into(parts: Sequence[Part], networks: Sequence[tuple[Path, float]]) -> None:
    """Add the deltas of networks' files, each times its multiplier, to the weights of a model.

    Each delta is that of the weights as they were, and their sum is rounded once, so the order of
    the files does not matter. On the meta device only what does not fit is told.

    Args:
        parts: All parts of the model.
        networks: Each file with its multiplier.

    Raises:
        UserError: With everything that is wrong with the files.
    """
    layers = {
        f"{part.prefix}_{name}": part.module.get_submodule(path)
        for part in parts
        for path, name in part.file_names.items()
    }
    files = [(open_network(path), multiplier) for path, multiplier in networks]
    if problems := [problem for file, _ in files for problem in _misfits(file, layers)]:
        raise UserError(problems)
    with ExitStack() as opened:
        added: dict[str, list[_Added]] = {}
        for file, multiplier in files:
            read = opened.enter_context(file.weights())
            for module in file.modules.values():
                one = _Added(module=module, read=read, multiplier=multiplier, path=file.path)
                added.setdefault(module.name, []).append(one)
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
        shape, own = module.weight_shape, _parameter(layer, "weight").shape
        if shape and (shape[0], torch.Size(shape[1:]).numel()) != (own[0], own[1:].numel()):
            yield Problem(
                place=str(file.path),
                message=f"{name} is for a weight {list(shape)}, the base model's is {list(own)}",
                remedy="merge a network for this model",
            )
        if module.shapes.keys() & {"diff_b", "b_norm"} and getattr(layer, "bias", None) is None:
            yield Problem(
                place=str(file.path), message=f"{name} is for a bias, which the base model lacks"
            )


@torch.no_grad()
def _merge(layer: nn.Module, summands: Sequence[_Added]) -> None:
    before = _parameter(layer, "weight")
    if before.is_meta:
        return
    weight = before.detach().float().cpu()
    sums: dict[str, Tensor] = {"weight": weight.clone()}
    if getattr(layer, "bias", None) is not None:
        sums["bias"] = _parameter(layer, "bias").detach().float().cpu()
    for one in summands:
        tensors = one.read(one.module)
        found = {"weight": delta(one.module, tensors, weight), "bias": bias_delta(tensors)}
        for name, difference in found.items():
            if difference is None:
                continue
            sums[name] += one.multiplier * difference.reshape(sums[name].shape)
    for name, merged in sums.items():
        _set(layer, name, merged)


def _parameter(layer: nn.Module, name: str) -> Tensor:
    tensor = getattr(layer, name)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _set(layer: nn.Module, name: str, value: Tensor) -> None:
    before = _parameter(layer, name)
    if isinstance(before, nn.Parameter):
        before.copy_(value)
    else:
        # Weights that are stored in another form are made anew when they are read.
        setattr(layer, name, value.to(before))
