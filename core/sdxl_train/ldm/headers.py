"""Headers of weight files: names and shapes of tensors, told from the first bytes.

Of safetensors files this reads no weights and needs no torch. Their format is an 8-byte
little-endian length, a JSON header of that length, then the tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Shapes: TypeAlias = "Mapping[str, tuple[int, ...]]"
"""Shapes of the tensors of a file, by name."""

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library accepts; the header of a full-size model has 0.3 MB."""

_NUM_SHOWN = 5

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Size of a number of each dtype of the format."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Why a source cannot serve, without its place: ``remedy`` may be empty."""

    message: str
    remedy: str = ""


class BadFileError(Exception):
    """A file is not what its reader needs."""

    def __init__(self, message: str, remedy: str = "") -> None:
        self.fault = Fault(message=message, remedy=remedy)
        super().__init__(message)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says about itself; dtypes are named as in it (``F16``).

    Attributes:
        places: The first byte of each tensor in the file, and the first behind it; none for files
            that torch wrote.
    """

    path: Path
    shapes: Shapes
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]
    places: Mapping[str, tuple[int, int]]


PICKLED = frozenset({".pt", ".pth", ".ckpt", ".bin"})
"""Endings of files that torch wrote."""


def read_header(path: Path, *, pickles: bool = False) -> Header:
    """Read the header of a safetensors file.

    Args:
        path: The file.
        pickles: Whether files that torch wrote are read too, by its loader that builds tensors and
            nothing else; this imports torch for such a file.

    Raises:
        BadFileError: If the file cannot be read, is truncated, or is something else; the message
            says what.
    """
    if pickles and path.suffix.lower() in PICKLED:
        from sdxl_train.ldm.pickled import read_tensors

        tensors = read_tensors(path)
        return Header(
            path=path,
            shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            dtypes={name: str(tensor.dtype) for name, tensor in tensors.items()},
            metadata={},
            places={},
        )
    try:
        stat = path.stat()
        return _read(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise BadFileError(f"{path.name} cannot be read: {error.strerror}") from error


@cache
def _read(path: Path, size: int, _modified: int) -> Header:
    """Read a header once for each state of a file."""
    if size == 0:
        raise BadFileError(f"{path.name} is empty (0 bytes)", "download it again")
    with path.open("rb") as file:
        start = file.read(512)
        refuse_other_formats(path, start)
        length = int.from_bytes(start[:_LENGTH_BYTES], "little")
        if size < _LENGTH_BYTES or length > _MAX_HEADER_BYTES or start[8:9] not in (b"{", b""):
            raise BadFileError(f"{path.name} is not a safetensors file: its first bytes are noise")
        file.seek(_LENGTH_BYTES)
        raw = file.read(length)
    if len(raw) < length:
        raise _truncated(path, declared=_LENGTH_BYTES + length, size=size)
    try:
        content = json.loads(raw)
        metadata = dict(content.pop("__metadata__", None) or {})
        entries = {name: _Entry(**entry) for name, entry in content.items()}
        end = max((entry.data_offsets[1] for entry in entries.values()), default=0)
        misfit = next((name for name, entry in entries.items() if not entry.fits()), None)
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise BadFileError(
            f"{path.name} has a damaged safetensors header", "download it again"
        ) from error
    first = _LENGTH_BYTES + length
    if (declared := first + end) != size:
        raise _truncated(path, declared=declared, size=size)
    if misfit is not None:
        raise BadFileError(
            f"{path.name} has a damaged safetensors header: the shape and the bytes of {misfit} do "
            "not fit together",
            "download it again",
        )
    return Header(
        path=path,
        shapes={name: tuple(entry.shape) for name, entry in entries.items()},
        dtypes={name: entry.dtype for name, entry in entries.items()},
        metadata={str(name): str(text) for name, text in metadata.items()},
        places={
            name: (first + entry.data_offsets[0], first + entry.data_offsets[1])
            for name, entry in entries.items()
        },
    )


@dataclass(frozen=True)
class _Entry:
    """What the header says of one tensor."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]

    def fits(self) -> bool:
        """Tell whether the bytes are as many as the shape needs, for dtypes that are known."""
        start, end = self.data_offsets
        bits = _BITS.get(self.dtype)
        return start >= 0 and (bits is None or (end - start) * 8 == prod(self.shape) * bits)


def counted(names: Sequence[str], noun: str = "tensor") -> str:
    """Give the number of tensors and the first five names: ``2 tensors: a, b``."""
    count = f"1 {noun}" if len(names) == 1 else f"{len(names)} {noun}s"
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return f"{count}: {', '.join(names[:_NUM_SHOWN])}{more}"


def _truncated(path: Path, *, declared: int, size: int) -> BadFileError:
    state = "is truncated" if size < declared else "has bytes after its end"
    return BadFileError(
        f"{path.name} {state}: its header declares {declared:,} bytes, the file has {size:,}",
        "download it again",
    )


def refuse_other_formats(path: Path, start: bytes, *, pickles: bool = True) -> None:
    """Raise for the formats that are found under the name of a weight file.

    Args:
        path: The file.
        start: Its first 512 bytes.
        pickles: Whether pickles are among what is refused.

    Raises:
        BadFileError: If it is one of them.
    """
    # Text follows only where a safetensors file has eight bytes of length, so look at all of them.
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise BadFileError(
            f"{path.name} is a web page (HTML), not weights",
            "the download asked for a login or hit an error page: download it again",
        )
    if text.startswith(b"version https://git-lfs"):
        raise BadFileError(f"{path.name} is a Git LFS pointer, not weights", "run `git lfs pull`")
    if text.startswith(b'{"'):
        raise BadFileError(f"{path.name} is a JSON file, not weights")
    if not pickles:
        return
    # A zip is what torch.save writes; older versions wrote a bare pickle of protocol 2 or later.
    is_pickle = start.startswith(b"PK\x03\x04") or b"\x80\x02" <= start[:2] <= b"\x80\x05"
    if is_pickle and start[8:9] != b"{":
        named = "a pickle named .safetensors" if path.suffix == ".safetensors" else "a pickle"
        raise BadFileError(
            f"{path.name} is {named}: loading it could run any code, so it is never unpickled",
            "convert it to .safetensors",
        )
