"""Tensors for a network: whether they fit, and beginning with those of a file."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from sdxl_train.errors import Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from sdxl_train.protocols import Adapter, LimitedDelta, LoadedModel

logger = logging.getLogger(__name__)

_NAMED = 3
"""So many examples a message gives."""


def require_fit(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], place: str = "network weights"
) -> None:
    """Refuse tensors that are not exactly those a network has.

    Args:
        own: What the network has, as ``Adapter.state_dict`` gives it. Names are a layer's name, a
            dot, and what the tensor is; a tensor without dimensions is a setting such as ``alpha``.
        given: What it is to take.
        place: What messages name as the place of ``given``.

    Raises:
        UserError: If names are missing or unknown, or a shape or a setting differs. Each kind of
            mistake is one problem, with its count and examples.
    """
    problems = list(_differences(own, given, place))
    if problems:
        raise UserError(problems)


def start_from(adapter: Adapter, model: LoadedModel, path: Path, place: str) -> None:
    """Let a network begin with the tensors of a file.

    Layers that the file does not have stay as they are, layers that the network does not adapt
    are left out; both are counted in a warning.

    Raises:
        UserError: If they have no layer in common, or a common one does not fit.
    """
    own, given = adapter.state_dict(), model.read_network(path)
    ours, theirs = _layers(own), _layers(given)
    common = ours & theirs
    if not common:
        raise UserError.of(
            place,
            f"has no layer that this network adapts, but {_examples(theirs)}",
            "check that it is for this kind of model, and which parts are trained",
        )
    chosen = {name: tensor for name, tensor in given.items() if _layer(name) in common}
    wanted = {name: tensor for name, tensor in own.items() if _layer(name) in common}
    kinds = [model.describe_network(tensors) for tensors in (chosen, wanted)]
    if kinds[0] != kinds[1]:
        raise UserError.of(
            place,
            f"{path.name} is {kinds[0]}, and this run trains {kinds[1]}",
            "choose the --network_module and --network_args that made the file",
        )
    require_fit(wanted, chosen, place)
    adapter.load_state_dict({**own, **chosen})
    if fresh := ours - theirs:
        logger.warning(
            "%s: has nothing for %d of %d adapted layers (%s); they start afresh",
            place,
            len(fresh),
            len(ours),
            _examples(fresh),
        )
    if unused := theirs - ours:
        logger.warning(
            "%s: %d of its %d layers are not adapted in this run (%s) and are left out",
            place,
            len(unused),
            len(theirs),
            _examples(unused),
        )


@torch.no_grad()
def limit_norms(deltas: Collection[LimitedDelta], limit: float) -> dict[str, Tensor]:
    """Shrink the deltas whose norms are above a limit, as sd-scripts does.

    Args:
        deltas: Those of all layers.
        limit: The largest norm that stays.

    Returns:
        What to log under sd-scripts' names.
    """
    norms = torch.stack([delta.norm() for delta in deltas])
    # A norm below half of the limit counts as half of it.
    counted = norms.clamp(min=limit / 2)
    ratios = counted.clamp(max=limit) / counted
    for delta, ratio in zip(deltas, ratios, strict=True):
        delta.shrink(ratio)
    kept = norms * ratios
    return {
        "max_norm/keys_scaled": (ratios < 1).sum(),
        "max_norm/avg_key_norm": kept.mean(),
        "max_norm/max_key_norm": kept.max(),
    }


def _differences(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], place: str
) -> Iterator[Problem]:
    missing, unknown = own.keys() - given.keys(), given.keys() - own.keys()
    for what, keys in (("missing", missing), ("unknown", unknown)):
        if keys:
            kinds = sorted({key.partition(".")[2] for key in keys})
            yield Problem(
                place=place,
                message=f"{len(keys)} keys are {what} ({', '.join(kinds)}), among them "
                f"{_examples(keys)}",
                remedy="train with the network and the options that made the file",
            )
    both = sorted(own.keys() & given.keys())
    shapes = [key for key in both if own[key].shape != given[key].shape]
    if shapes:
        key = shapes[0]
        yield Problem(
            place=place,
            message=f"{len(shapes)} tensors have another shape, among them {key} with "
            f"{list(given[key].shape)}, expected {list(own[key].shape)}",
            remedy="set the rank and what else shapes the factors to those of the file",
        )
    settings = [
        key
        for key in both
        if key not in shapes and own[key].ndim == 0 and not _agree(given[key], own[key])
    ]
    if settings:
        key = settings[0]
        yield Problem(
            place=place,
            message=f"{len(settings)} settings differ, among them {key}, which is "
            f"{given[key].item():g}, expected {own[key].item():g}",
            remedy="set alpha and rank to those of the file",
        )


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Compare two scalars as exactly as the coarser of their types can tell."""
    kinds = [tensor.dtype for tensor in (found, expected) if tensor.is_floating_point()]
    tolerance = max([torch.finfo(kind).eps for kind in kinds], default=0.0)
    return torch.isclose(found.cpu().float(), expected.cpu().float(), rtol=tolerance).item() is True


def _layers(names: Iterable[str]) -> set[str]:
    return {_layer(name) for name in names}


def _layer(name: str) -> str:
    return name.partition(".")[0]


def _examples(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:_NAMED]) + (", ..." if len(listed) > _NAMED else "")
