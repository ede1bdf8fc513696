"""What is known of a file, and how the facts on a folder's files are written down."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias

from sdxl_train.data.captions import CaptionFile
from sdxl_train.data.images import ImageHeader  # noqa: TC001 - pydantic reads it

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from pydantic import TypeAdapter

_FORMAT = 8
"""Another one when a reader of files gives something else than before."""

Stamp: TypeAlias = tuple[int, int, int, int]
"""Size, times of modification and of change in ns, inode."""
Mark: TypeAlias = int
"""A stamp hashed to 64 bits, which two stamps share once in 10^18 times."""


@dataclass(slots=True)
class FileFacts:
    """What is known of a file.

    Attributes:
        mark: Tells whether it was touched.
        num_bytes: Its length.
        header: The head of an image.
        caption: The content of a caption file.
        content: Hash of all its bytes.
        sound: Whether all of it was read without a fault, as what it should be.
    """

    mark: Mark
    num_bytes: int
    header: ImageHeader | None = None
    caption: CaptionFile | None = None
    content: str | None = None
    sound: bool = False


stamp_of: Callable[[os.stat_result], Stamp] = attrgetter(
    "st_size", "st_mtime_ns", "st_ctime_ns", "st_ino"
)
"""Give the stamp of a file."""


def mark_of(status: os.stat_result) -> Mark:
    """Give the mark of a file."""
    return hash(stamp_of(status))


class KeptFacts:
    """The facts on the files of a folder as they were kept, a column for each kind of fact.

    Those on a file are put together when they are asked for: there may be 200 000 files.

    Attributes:
        rows: The place of each file in the columns.
        marks: The marks of the files.
        num_bytes: Their lengths.
        headers: The heads of images.
        sound: Which files were read to their end without a fault.
    """

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.marks = array("q")
        self.num_bytes = array("q")
        self.headers: list[ImageHeader | None] = []
        self.sound: list[bool] = []
        self._captions: list[str] = []
        self._odd_captions: dict[int, CaptionFile] = {}
        self._contents: list[str] = []

    @classmethod
    def of(cls, data: bytes) -> KeptFacts:
        """Read what :func:`packed` wrote.

        Raises:
            ValueError: If it is damaged, or of another version.
        """
        columns = _columns().validate_json(data)
        if columns.format != _FORMAT:
            raise ValueError("another version")
        kept, kinds = cls(), [*columns.header_kinds, None]
        names = columns.names.split("/")
        kept.rows = dict(zip(names, range(len(names)), strict=True))
        kept.marks = _numbers("q", columns.marks)
        kept.num_bytes = _numbers("q", columns.num_bytes)
        try:
            kept.headers = [kinds[kind] for kind in _numbers("I", columns.headers)]
            kept.sound = [_SOUND[digit] for digit in columns.sound]
        except LookupError:
            raise ValueError("there are no such facts") from None
        kept._captions = columns.captions.split("\t")
        kept._odd_captions = columns.odd_captions
        kept._contents = columns.contents.split(",")
        kept._check()
        return kept

    def _check(self) -> None:
        lengths = {
            len(column)
            for column in (
                self.rows,
                self.marks,
                self.num_bytes,
                self.headers,
                self.sound,
                self._captions,
                self._contents,
            )
        }
        if lengths != {len(self.rows)} or max(self._odd_captions, default=0) >= len(self.rows):
            raise ValueError("columns that do not fit each other")

    def caption(self, row: int) -> CaptionFile | None:
        """Give the content of a file that was read as a caption."""
        lines = self._captions[row]
        return CaptionFile(lines) if lines else self._odd_captions.get(row)

    def content(self, row: int) -> str | None:
        """Give the hash of all bytes of a file that was read."""
        return self._contents[row] or None

    def facts(self, row: int) -> FileFacts:
        """Put together what is known of a file."""
        return FileFacts(
            mark=self.marks[row],
            num_bytes=self.num_bytes[row],
            header=self.headers[row],
            caption=self.caption(row),
            content=self.content(row),
            sound=self.sound[row],
        )


_SOUND = {"0": False, "1": True}


def _numbers(kind: str, digits: str) -> array[int]:
    numbers = array(kind)
    numbers.frombytes(bytes.fromhex(digits))
    return numbers


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """The columns as a file holds them: long texts are read many times faster than lists.

    What many files share, or most have none of, stands in a table of its own. Numbers are those of
    this machine, in hexadecimal digits.
    """

    format: int
    names: str
    """With slashes between them, which no name has in it."""
    marks: str
    num_bytes: str
    header_kinds: list[ImageHeader]
    headers: str
    """Index into ``header_kinds``, or their number for none."""
    captions: str
    """With tabs between them, which no caption has in it. Nothing for none."""
    odd_captions: dict[int, CaptionFile]
    """Captions that are more than their lines, by row."""
    contents: str
    """With commas between them. Nothing for none."""
    sound: str
    """Of each file 1 or 0."""


@cache
def _columns() -> TypeAdapter[_Columns]:
    from pydantic import TypeAdapter

    return TypeAdapter(_Columns)


def packed(facts: dict[str, FileFacts]) -> bytes:
    """Write down the facts on the files of a folder, by their names, which must be Unicode."""
    every = list(facts.values())
    kinds = {fact.header: None for fact in every if fact.header is not None}
    numbers: dict[ImageHeader | None, int] = {kind: number for number, kind in enumerate(kinds)}
    captions: list[str] = []
    odd: dict[int, CaptionFile] = {}
    for row, caption in enumerate(fact.caption for fact in every):
        is_plain = caption is not None and caption == CaptionFile(caption.content)
        captions.append(caption.content if caption is not None and is_plain else "")
        if caption is not None and not is_plain:
            odd[row] = caption
    columns = _Columns(
        format=_FORMAT,
        names="/".join(facts),
        marks=_digits("q", [fact.mark for fact in every]),
        num_bytes=_digits("q", [fact.num_bytes for fact in every]),
        header_kinds=list(kinds),
        headers=_digits("I", [numbers.get(fact.header, len(kinds)) for fact in every]),
        captions="\t".join(captions),
        odd_captions=odd,
        contents=",".join(fact.content or "" for fact in every),
        sound="".join("1" if fact.sound else "0" for fact in every),
    )
    return _columns().dump_json(columns)


def _digits(kind: str, numbers: list[int]) -> str:
    return array(kind, numbers).tobytes().hex()
