"""One encoding in a file that says what it was made of, and can tell when it is damaged."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sdxl_train.data.listing import CACHE_FOLDER
from sdxl_train.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

FORMAT = "1"
"""Another one when the same facts give another content than before."""


class EntryError(Exception):
    """A file is no sound encoding of what it should be; the message says why, without its path."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where the encoding of one thing lies.

    Attributes:
        image: The image that it belongs to; of captions that several have, the first.
        kind: ``latents`` or ``text``.
        subject: What is encoded, whatever becomes of it: the name of an image, or a caption.
        facts: All that shapes the encoding: title, for messages, to value.
    """

    image: Path
    kind: str
    subject: str
    facts: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """The folder of the file."""
        return self.image.parent / CACHE_FOLDER

    @cached_property
    def slot(self) -> str:
        """The first words of the file's name, shared by all encodings of the subject."""
        return f"{self.kind}-{_digest(self.subject, 8)}-"

    @cached_property
    def name(self) -> str:
        """The name of the file: other facts make another name."""
        return f"{self.slot}{_digest(json.dumps(self._all_facts, sort_keys=True), 16)}.safetensors"

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.name

    def read(self) -> dict[str, Tensor]:
        """Read and check the file.

        Raises:
            EntryError: If it is missing, damaged, of something else, or not finite.
        """
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise EntryError(f"cannot be read: {error.strerror}") from None
        metadata = _metadata(data)
        try:
            tensors = load(data)
        except (SafetensorError, KeyError, ValueError) as error:
            raise EntryError(f"is damaged: {error}") from None
        if (metadata.get("slot"), metadata.get("facts")) != (self.slot, self._all_facts):
            raise EntryError("belongs to something else")
        if metadata.get("crc32") != _checksum(tensors):
            raise EntryError("is damaged: its checksum is wrong")
        if not is_finite(tensors):
            raise EntryError("is not finite")
        return tensors

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: If it cannot be written.
        """
        # Tensors may share memory, which safetensors does not write.
        own = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        metadata = {
            "slot": self.slot,
            "image": self.image_digest,
            "facts": json.dumps(self._all_facts, sort_keys=True),
            "crc32": _checksum(own),
        }
        self.folder.mkdir(exist_ok=True)
        replace_file(self.path, save(own, metadata), durable=False)

    def changed_since(self, earlier: Iterable[Origin]) -> list[str]:
        """Say what is other than in the most similar of some encodings of before.

        Returns:
            Titles of facts; none if there was nothing before.
        """
        return min(map(self._changed, earlier), key=len, default=[])

    @property
    def image_digest(self) -> str:
        """Stands for the name of the image."""
        return _digest(self.image.name, 8)

    def _changed(self, origin: Origin) -> list[str]:
        now, then = self._all_facts, origin.facts
        # Of an image, another slot than its own can only be that of another caption.
        caption = ["the caption"] if origin.slot != self.slot else []
        return caption + [title for title in now if now[title] != then.get(title)]

    @property
    def _all_facts(self) -> dict[str, str]:
        return {**self.facts, "the format": FORMAT}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the head of a file tells of where its encoding came from."""

    slot: str
    image: str
    facts: Mapping[str, object]


def read_origin(path: Path) -> Origin | None:
    """Read the head of a file; None if it is not one of this program's files."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            told = _metadata(head + file.read(_header_length(head)))
    except (OSError, EntryError):
        return None
    facts = told["facts"]
    return Origin(
        slot=str(told.get("slot")),
        image=str(told.get("image")),
        facts=facts if isinstance(facts, dict) else {},
    )


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether no value is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


_LONGEST_HEADER = 1 << 20


def _header_length(data: bytes) -> int:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 0 < length <= _LONGEST_HEADER:
        raise EntryError("is no safetensors file")
    return length


def _metadata(data: bytes) -> dict[str, Any]:
    """Read what :meth:`Entry.write` tells of an encoding, of which ``facts`` is parsed.

    Raises:
        EntryError: If there is no such thing.
    """
    try:
        header = json.loads(data[8 : 8 + _header_length(data)])
        metadata = header["__metadata__"]
        return {**metadata, "facts": json.loads(metadata["facts"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise EntryError("is not one of this program's files") from None


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _digest(text: str, size: int) -> str:
    # Names of files may hold bytes that are no text.
    data = text.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, digest_size=size).hexdigest()
