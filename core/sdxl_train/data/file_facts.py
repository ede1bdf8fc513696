"""What is known of a file, and how the facts on a folder's files are written down."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

from sdxl_train.data.captions import CaptionFile
from sdxl_train.data.images import ImageHeader  # noqa: TC001 - pydantic reads it

if TYPE_CHECKING:
    import os

    from pydantic import TypeAdapter

_FORMAT = 7
"""Another one when a reader of files gives something else than before."""

Stamp: TypeAlias = tuple[int, int, int, int]
"""Size, times of modification and of change in ns, inode."""


@dataclass(slots=True)
class FileFacts:
    """What is known of a file.

    Attributes:
        stamp: Size, times of modification and of change in ns, inode.
        header: The head of an image.
        caption: The content of a caption file.
        content: Hash of all its bytes.
        sound: Whether all of it was read without a fault, as what it should be.
    """

    stamp: Stamp
    header: ImageHeader | None = None
    caption: CaptionFile | None = None
    content: str | None = None
    sound: bool = False


def stamp_of(status: os.stat_result) -> Stamp:
    """Give the stamp of a file; of an inode's number the last 63 bits."""
    inode = status.st_ino & 0x7FFF_FFFF_FFFF_FFFF
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, inode


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """The facts on files as a file holds them, one list for each; that reads ten times faster.

    What many files share, or most have none of, stands in a table of its own.
    """

    format: int
    names: list[str]
    stamps: str
    """All of them as 64-bit integers of this machine, in hexadecimal digits."""
    header_kinds: list[ImageHeader]
    headers: list[int | None]
    """Index into ``header_kinds``."""
    captions: list[str | None]
    """The lines, with line feeds between them."""
    odd_captions: dict[int, CaptionFile]
    """Captions that are more than their lines, by index."""
    contents: list[str | None]
    sound: list[bool]


@cache
def _columns() -> TypeAdapter[_Columns]:
    from pydantic import TypeAdapter

    return TypeAdapter(_Columns)


def packed(facts: dict[str, FileFacts]) -> bytes:
    """Write down the facts on the files of a folder, by their names, which must be Unicode."""
    every = list(facts.values())
    kinds = {fact.header: None for fact in every if fact.header is not None}
    numbers = {header: number for number, header in enumerate(kinds)}
    captions = [fact.caption for fact in every]
    texts = [None if caption is None else "\n".join(caption.lines) for caption in captions]
    columns = _Columns(
        format=_FORMAT,
        names=list(facts),
        stamps=array("q", [number for fact in every for number in fact.stamp]).tobytes().hex(),
        header_kinds=list(kinds),
        headers=[None if fact.header is None else numbers[fact.header] for fact in every],
        captions=texts,
        odd_captions={
            number: caption
            for number, (caption, text) in enumerate(zip(captions, texts, strict=True))
            if caption is not None and text is not None and caption != _plain_caption(text)
        },
        contents=[fact.content for fact in every],
        sound=[fact.sound for fact in every],
    )
    return _columns().dump_json(columns)


def unpacked(data: bytes) -> dict[str, FileFacts]:
    """Read what :func:`packed` wrote.

    Raises:
        ValueError: If it is damaged, or of another version.
    """
    columns = _columns().validate_json(data)
    if columns.format != _FORMAT:
        raise ValueError("another version")
    numbers = array("q")
    numbers.frombytes(bytes.fromhex(columns.stamps))
    number = iter(numbers)
    rows = zip(
        columns.names,
        zip(number, number, number, number, strict=True),
        columns.headers,
        columns.captions,
        columns.contents,
        columns.sound,
        strict=True,
    )
    kinds, odd = columns.header_kinds, columns.odd_captions
    try:
        facts = {
            name: FileFacts(
                stamp,
                None if header is None else kinds[header],
                None if text is None else _plain_caption(text),
                content,
                sound,
            )
            for name, stamp, header, text, content, sound in rows
        }
        for index, caption in odd.items():
            facts[columns.names[index]].caption = caption
    except IndexError:
        raise ValueError("lists that do not fit each other") from None
    return facts


def _plain_caption(text: str) -> CaptionFile:
    return CaptionFile(lines=tuple(text.split("\n")))
