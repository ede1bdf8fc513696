"""Writing safetensors files tensor by tensor: complete or not at all, never all in memory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final

import torch

from sdxl_train.disk import free_bytes
from sdxl_train.errors import TrainingError
from sdxl_train.files import replacing
from sdxl_train.finite import is_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

TENSOR_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""torch's dtypes by the names that safetensors files have for them."""
_NAMES: Final = {dtype: name for name, dtype in TENSOR_DTYPES.items()}
_LEGACY: Final = (0x100000, 0x110000)
"""The bytes of a file that A1111's first hash is of."""
_LENGTH_BYTES: Final = 8


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to come: its dtype in the file, and its shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path,
    entries: Mapping[str, TensorEntry],
    tensors: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> None:
    """Write a safetensors file, asking for one tensor after the other.

    The hashes that model managers look for are added to the header. ``sshs_model_hash`` is the
    sha256 of everything behind it, so it names the weights whatever the metadata;
    ``sshs_legacy_hash`` is the one A1111 computed first: sha256 of the 64 KiB at 1 MiB of the file
    with only its ``ss_*`` metadata.

    Args:
        path: The file; what it held before stays if this fails.
        entries: Dtypes and shapes by name, known before the first tensor is.
        tensors: Gives a tensor by name, on any device; it is cast to its dtype.
        metadata: The header's metadata, without hashes.
        progress: Wraps the names as they are written.

    Raises:
        TrainingError: If a tensor is not finite, the disk has too little room, or the file cannot
            be written.
    """
    # As the format's library does: wide numbers first keep every tensor aligned.
    names = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    content = _content(names, entries)
    blank = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
    header = _header(content, {**metadata, **blank})
    _require_room(path, len(header) + sum(entry.num_bytes for entry in entries.values()))
    digest = _Digest(len(_header(content, _of_training(metadata))))
    try:
        with replacing(path) as file:
            file.write(header)
            for name in progress(names):
                data = _bytes(path, name, tensors(name), entries[name])
                digest.update(data)
                file.write(data)
            file.seek(0)
            file.write(_header(content, {**metadata, **digest.hashes()}))
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror}") from error


def hashes_of(path: Path) -> dict[str, str]:
    """Compute the two hashes of a safetensors file that is there, whatever its header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        content = json.loads(file.read(length))
        metadata = content.pop("__metadata__", {})
        digest = _Digest(len(_header(content, _of_training(metadata))))
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hashes()


class _Digest:
    """The two hashes of the bytes behind a header."""

    def __init__(self, legacy_header: int) -> None:
        self._whole, self._window = hashlib.sha256(), hashlib.sha256()
        self._position = legacy_header

    def update(self, data: bytes) -> None:
        """Take the bytes that come next."""
        self._whole.update(data)
        start, end = (min(max(edge - self._position, 0), len(data)) for edge in _LEGACY)
        self._window.update(data[start:end])
        self._position += len(data)

    def hashes(self) -> dict[str, str]:
        """Give the metadata of the bytes so far."""
        return {
            "sshs_model_hash": self._whole.hexdigest(),
            "sshs_legacy_hash": self._window.hexdigest()[:8],
        }


def _of_training(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in metadata.items() if name.startswith("ss_")}


def _content(names: Iterable[str], entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    content = {}
    end = 0
    for name in names:
        entry = entries[name]
        start, end = end, end + entry.num_bytes
        content[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    return content


def _header(content: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    whole = {"__metadata__": dict(metadata), **content} if metadata else content
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _bytes(path: Path, name: str, tensor: Tensor, entry: TensorEntry) -> bytes:
    cast = tensor.detach().to(device="cpu", dtype=entry.dtype).contiguous()
    if tuple(cast.shape) != entry.shape:
        raise ValueError(f"{name} has shape {list(cast.shape)}, announced as {list(entry.shape)}")
    if not is_finite(cast):
        raise TrainingError(
            f"{name} is not finite as {_NAMES[entry.dtype]}; nothing was written to {path}"
        )
    return cast.reshape(-1).view(torch.uint8).numpy().tobytes()


def _require_room(path: Path, num_bytes: int) -> None:
    free = free_bytes(path.parent)
    if num_bytes > free:
        raise TrainingError(
            f"{path} needs {num_bytes:,} bytes, and the disk has {free:,} free: nothing was "
            f"written; make room"
        )
