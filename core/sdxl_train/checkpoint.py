"""Files of a run: their names, and how they come to be complete or not at all."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_train.errors import TrainingError
from sdxl_train.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from sdxl_train.config import OutputOptions, SaveFormat
    from sdxl_train.counts import SavePoint


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A saved network.

    Attributes:
        path: The complete file, or the folder that holds it where diffusers wants one.
        kind: ``epoch``, ``step``, ``best`` or ``final``.
        step: Optimizer steps done.
        epoch: Epochs begun.
    """

    path: Path
    kind: str
    step: int
    epoch: int


_ENDINGS: dict[SaveFormat, str] = {
    "safetensors": ".safetensors",
    "ckpt": ".ckpt",
    "pt": ".pt",
    "diffusers": "",
    "diffusers_safetensors": "",
}
"""How the names of networks end, by format; without an ending it is a folder."""
FOLDER_FORMATS = frozenset(name for name, ending in _ENDINGS.items() if not ending)
PICKLED_FORMATS = frozenset({"ckpt", "pt"})
"""Formats of torch, which have no place for metadata."""
_IN_FOLDER = "pytorch_lora_weights.safetensors"
"""The file that diffusers looks for in a folder."""

STEMS = {"epoch": "epoch", "step": "at", "best": "last", "final": "last"}
"""What sd-scripts calls files when the run has no name."""


def file_name(output: OutputOptions, point: SavePoint) -> str:
    """Name a network as sd-scripts does: ``NAME-000002``, ``NAME-step00000100``, ``NAME``."""
    return _stem(output, point) + _ENDINGS[output.save_model_as]


def average_path(output: OutputOptions, path: Path) -> Path:
    """Give where the average of the weights lies that belongs to a network: ``NAME-ema``."""
    ending = _ENDINGS[output.save_model_as]
    return path.with_name(f"{path.name.removesuffix(ending)}-ema{ending}")


def is_network(path: Path) -> bool:
    """Tell whether this is a file or folder as :func:`save_network` makes them."""
    if path.is_dir():
        return (path / _IN_FOLDER).is_file()
    return path.suffix in filter(None, _ENDINGS.values())


def state_name(output: OutputOptions, point: SavePoint) -> str:
    """Name the folder of a state as sd-scripts does: ``NAME-000002-state``."""
    return f"{_stem(output, point)}-state"


def _stem(output: OutputOptions, point: SavePoint) -> str:
    suffix = {
        "epoch": f"-{point.number:06d}",
        "step": f"-step{point.number:08d}",
        "best": "-best",
        "final": "",
    }[point.kind]
    return (output.output_name or STEMS[point.kind]) + suffix


def _to_keep(output: OutputOptions, kind: str) -> tuple[int | None, int | None]:
    """Give how many networks and states of a kind stay; None means all.

    States are counted apart where ``save_last_n_*_state`` says so.
    """
    networks, states = {
        "epoch": (output.save_last_n_epochs, output.save_last_n_epochs_state),
        "step": (output.save_last_n_steps, output.save_last_n_steps_state),
        "best": (1, 1),
        "final": (None, None),
    }[kind]
    return networks, states or networks


def kept(output: OutputOptions, points: Sequence[SavePoint]) -> tuple[int, int]:
    """Give how many networks and states lie there when all of ``points`` have been saved."""
    networks = states = 0
    for kind in STEMS:
        of_kind = [point for point in points if point.kind == kind]
        keep_networks, keep_states = _to_keep(output, kind)
        networks += min(sum(p.network for p in of_kind), keep_networks or len(of_kind))
        states += min(sum(p.state for p in of_kind), keep_states or len(of_kind))
    return networks, states


def prune(output: OutputOptions, point: SavePoint) -> list[Path]:
    """Give the networks and states of this kind beyond the number to keep, the oldest first.

    ``save_last_n_*=M`` keeps the newest M, counted up to the one just written.
    """
    if point.kind in ("best", "final"):
        return []
    networks, states = _to_keep(output, point.kind)
    stem = re.escape(output.output_name or STEMS[point.kind])
    digits = r"-(\d{6})" if point.kind == "epoch" else r"-step(\d{8})"
    ending = re.escape(_ENDINGS[output.save_model_as])
    paths = list(output.output_dir.iterdir())
    saved = filter(is_network, paths)
    return [
        *_beyond(saved, rf"{stem}{digits}{ending}", networks, point.number),
        *_beyond(paths, rf"{stem}{digits}-state", states, point.number),
    ]


def _beyond(paths: Iterable[Path], pattern: str, keep: int | None, newest: int) -> list[Path]:
    if keep is None:
        return []
    numbered = [
        (int(match[1]), path)
        for path in paths
        if (match := re.fullmatch(pattern, path.name)) and int(match[1]) <= newest
    ]
    return [path for _, path in sorted(numbered)[:-keep]]


def save_network(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype,
    save_as: SaveFormat,
) -> None:
    """Write a network under a name of :func:`file_name`.

    Args:
        path: The file, or the folder for it.
        tensors: By their names in it, on any device.
        metadata: For the header; formats of torch have none.
        dtype: What tensors of numbers are cast to.
        save_as: The format.

    Raises:
        TrainingError: If a tensor is not finite, or the file cannot be written.
    """
    from sdxl_train.tensor_file import TensorEntry, write_tensors

    if save_as in PICKLED_FORMATS:
        _save_pickled(path, {name: t.detach().cpu().to(dtype) for name, t in tensors.items()})
        return
    entries = {name: TensorEntry(dtype, tuple(t.shape)) for name, t in tensors.items()}
    if save_as in FOLDER_FORMATS:
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{path} cannot be made: {error.strerror}") from error
        path /= _IN_FOLDER
    write_tensors(path, entries, tensors.__getitem__, metadata)


def _save_pickled(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what ``torch.load`` reads with ``weights_only=True``."""
    import torch

    require_finite(tensors, path)
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    write_atomically(path, buffer.getvalue())


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse to write a value that is not finite.

    Raises:
        TrainingError: With the name of the tensor; nothing was written.
    """
    from sdxl_train.finite import is_finite

    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise TrainingError(f"{name} is not finite; nothing was written to {path}")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there complete or not at all, also after a crash.

    Raises:
        TrainingError: If it cannot be written. A file of that name keeps its old content.
    """
    try:
        replace_file(path, data)
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror}") from error
