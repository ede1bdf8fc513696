"""Writing safetensors files tensor by tensor: complete or not at all, never all in memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import torch

from sdxl_train import TrainingError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

DTYPES: Final = {
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
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_LEGACY: Final = (0x100000, 0x110000)
"""The bytes of a file that A1111's first hash is of."""


@dataclass(frozen=True)
class Entry:
    """A tensor to come: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path,
    entries: Mapping[str, Entry],
    tensors: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> None:
    """Write a safetensors file, asking for one tensor after the other.

    The hashes that model managers look for are in the header, as in files of training:
    ``sshs_model_hash`` is the sha256 of everything behind the header, ``sshs_legacy_hash`` of the
    64 KiB at 1 MiB of the file with only its ``ss_*`` metadata.

    Args:
        path: The file; what it held before stays if this fails.
        entries: Dtypes and shapes by name, known before the first tensor is.
        tensors: Gives a tensor by name; it is cast to its dtype.
        metadata: The header's metadata, without hashes.
        progress: Wraps the names as they are written.

    Raises:
        UserError: If the disk has too little room.
        TrainingError: If a tensor is not finite, or the file cannot be written.
    """
    # As the format's library does: wide numbers first keep every tensor aligned.
    names = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    blank = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
    header = _header(names, entries, {**metadata, **blank})
    _check_room(path, len(header) + sum(entry.num_bytes for entry in entries.values()))
    kept = {name: text for name, text in metadata.items() if name.startswith("ss_")}
    digest = _Digest(len(_header(names, entries, kept)))
    with _replacing(path) as file:
        file.write(header)
        for name in progress(names):
            data = _bytes(path, name, tensors(name), entries[name])
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(_header(names, entries, {**metadata, **digest.hashes()}))


def hashes_of(path: Path) -> dict[str, str]:
    """Compute the hashes of a safetensors file that is there, whatever its header says."""
    from sdxl_lora_plugins.model.headers import read_header

    header = read_header(path)
    entries = {
        name: Entry(DTYPES[header.dtypes[name]], shape) for name, shape in header.shapes.items()
    }
    kept = {name: text for name, text in header.metadata.items() if name.startswith("ss_")}
    names = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    digest = _Digest(len(_header(names, entries, kept)))
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
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


def _header(
    names: Iterable[str], entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> bytes:
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        entry = entries[name]
        start, end = end, end + entry.num_bytes
        content[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(path: Path, name: str, tensor: Tensor, entry: Entry) -> bytes:
    cast = tensor.detach().to(device="cpu", dtype=entry.dtype).contiguous()
    if tuple(cast.shape) != entry.shape:
        raise ValueError(f"{name} has shape {list(cast.shape)}, announced as {list(entry.shape)}")
    # Numbers of 8 bits have no test of their own.
    tested = cast.float() if entry.dtype.itemsize == 1 else cast
    if not torch.isfinite(tested).all():
        raise TrainingError(
            f"{name} is not finite as {_NAMES[entry.dtype]}; nothing was written to {path}"
        )
    return cast.reshape(-1).view(torch.uint8).numpy().tobytes()


def _check_room(path: Path, num_bytes: int) -> None:
    if not path.parent.is_dir():
        raise UserError.of(str(path), f"there is no folder {path.parent}", "make it first")
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise UserError.of(
            str(path), f"needs {num_bytes:,} bytes, the disk has {free:,}", "make room"
        )


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its name only when it is complete and on the disk."""
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; the result is for everyone the folder is for.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            with suppress(FileNotFoundError):
                temporary.unlink()
        if isinstance(error, OSError):
            raise TrainingError(f"{path} cannot be written: {error.strerror}") from error
        raise
