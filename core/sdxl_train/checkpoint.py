"""Files of a run: their names, and how they come to be complete or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_train.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping

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


_STEMS = {"epoch": "epoch", "step": "at", "final": "last"}
"""What sd-scripts calls files when the run has no name."""


def file_name(output: OutputOptions, point: SavePoint) -> str:
    """Name a file as sd-scripts does: ``NAME-000002``, ``NAME-step00000100``, ``NAME``."""
    stem = output.output_name or _STEMS[point.kind]
    suffix = {"epoch": f"-{point.number:06d}", "step": f"-step{point.number:08d}", "final": ""}
    return f"{stem}{suffix[point.kind]}.{output.save_model_as}"


def prune(output: OutputOptions, point: SavePoint) -> list[Path]:
    """Delete the oldest files of this kind beyond the number to keep; give what went.

    ``save_last_n_*=M`` keeps the newest M files, counted up to the one just written.
    """
    keep = {"epoch": output.save_last_n_epochs, "step": output.save_last_n_steps}.get(point.kind)
    if not keep:
        return []
    stem = re.escape(output.output_name or _STEMS[point.kind])
    digits = r"-(\d{6})" if point.kind == "epoch" else r"-step(\d{8})"
    pattern = re.compile(rf"{stem}{digits}\.{output.save_model_as}")
    numbered = [
        (int(match[1]), path)
        for path in output.output_dir.iterdir()
        if (match := pattern.fullmatch(path.name)) and int(match[1]) <= point.number
    ]
    gone = [path for _, path in sorted(numbered)[:-keep]]
    for path in gone:
        path.unlink()
    return gone


def save_network(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the hashes that model managers look for.

    ``sshs_model_hash`` is the sha256 of everything behind the header, so it names the weights
    whatever the metadata; ``sshs_legacy_hash`` is the one A1111 computed first: sha256 of the 64
    KiB at 1 MiB of the file with only the ``ss_*`` metadata.

    Raises:
        TrainingError: If a tensor is not finite, or the file cannot be written.
    """
    import safetensors.torch
    import torch

    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise TrainingError(f"{name} is not finite; nothing was written to {path}")
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


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there complete or not at all, also after a crash.

    Raises:
        TrainingError: If it cannot be written. A file of that name keeps its old content.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; the network is for everyone the folder is for.
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        if isinstance(error, OSError):
            raise TrainingError(f"{path} cannot be written: {error.strerror}") from error
        raise
    _sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
