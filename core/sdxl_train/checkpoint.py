"""Files of a run: their names, and how they come to be complete or not at all."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_train.errors import TrainingError
from sdxl_train.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdxl_train.config import OutputOptions
    from sdxl_train.counts import SavePoint


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A saved network.

    Attributes:
        path: The complete file.
        kind: ``epoch``, ``step`` or ``final``.
        step: Optimizer steps done.
        epoch: Epochs begun.
    """

    path: Path
    kind: str
    step: int
    epoch: int


STEMS = {"epoch": "epoch", "step": "at", "final": "last"}
"""What sd-scripts calls files when the run has no name."""


def file_name(output: OutputOptions, point: SavePoint) -> str:
    """Name a network as sd-scripts does: ``NAME-000002``, ``NAME-step00000100``, ``NAME``."""
    return f"{_stem(output, point)}.{output.save_model_as}"


def state_name(output: OutputOptions, point: SavePoint) -> str:
    """Name the folder of a state as sd-scripts does: ``NAME-000002-state``."""
    return f"{_stem(output, point)}-state"


def _stem(output: OutputOptions, point: SavePoint) -> str:
    suffix = {"epoch": f"-{point.number:06d}", "step": f"-step{point.number:08d}", "final": ""}
    return (output.output_name or STEMS[point.kind]) + suffix[point.kind]


def _to_keep(output: OutputOptions, kind: str) -> tuple[int | None, int | None]:
    """Give how many networks and states of a kind stay; None means all.

    States are counted apart where ``save_last_n_*_state`` says so.
    """
    networks, states = {
        "epoch": (output.save_last_n_epochs, output.save_last_n_epochs_state),
        "step": (output.save_last_n_steps, output.save_last_n_steps_state),
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
    if point.kind == "final":
        return []
    networks, states = _to_keep(output, point.kind)
    stem = re.escape(output.output_name or STEMS[point.kind])
    digits = r"-(\d{6})" if point.kind == "epoch" else r"-step(\d{8})"
    folder = output.output_dir
    return [
        *_beyond(folder, rf"{stem}{digits}\.{output.save_model_as}", networks, point.number),
        *_beyond(folder, rf"{stem}{digits}-state", states, point.number),
    ]


def _beyond(folder: Path, pattern: str, keep: int | None, newest: int) -> list[Path]:
    if keep is None:
        return []
    numbered = [
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := re.fullmatch(pattern, path.name)) and int(match[1]) <= newest
    ]
    return [path for _, path in sorted(numbered)[:-keep]]


def save_network(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the hashes that model managers look for.

    ``sshs_model_hash`` is the sha256 of everything behind the header, so it names the weights
    whatever the metadata; ``sshs_legacy_hash`` is the one A1111 computed first: sha256 of the 64
    KiB at 1 MiB of the file with only the ``ss_*`` metadata.

    Raises:
        TrainingError: If a tensor is not finite, or the file cannot be written.
    """
    import safetensors.torch

    require_finite(tensors, path)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    kept = {name: text for name, text in metadata.items() if name.startswith("ss_")}
    data = safetensors.torch.save(plain, kept)
    header = 8 + int.from_bytes(data[:8], "little")
    hashes = {
        "sshs_model_hash": hashlib.sha256(data[header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }
    del data
    write_atomically(path, safetensors.torch.save(plain, {**metadata, **hashes}))


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse to write a value that is not finite.

    Raises:
        TrainingError: With the name of the tensor; nothing was written.
    """
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
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
