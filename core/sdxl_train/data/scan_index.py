"""What is known of files from earlier starts, believed only while they are untouched.

Reading the heads of 100 000 images takes half a minute, asking the system whether they changed a
second. A file counts as untouched while its size, its times of modification and of change, and its
inode are the same. (A program can set the first time back, but not the second.) A file that
was written so shortly before that another write could bear the same times is not remembered.

The index lies in the user's cache folder, not beside the images. It can be deleted at any time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from sdxl_train.data.captions import CaptionFile, read_caption
from sdxl_train.data.images import ImageError, ImageHeader, load_image, read_header
from sdxl_train.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import TypeAdapter

_FORMAT = 5
"""Another one when a reader of files gives something else than before."""
_TICK_NS = 50_000_000
"""Longest step of the clock of a file system that tells parts of a second."""
_COARSE_TICK_NS = 2_000_000_000
"""The same of one that does not (FAT counts two seconds)."""

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


class FolderIndex:
    """What is known of the files of a folder, which are told by their names.

    Args:
        path: The folder.
        kept: The facts kept from before.
    """

    def __init__(self, path: str, kept: dict[str, FileFacts]) -> None:
        self.path = path
        self.changed = False
        self._kept = kept
        self._used: dict[str, FileFacts] = {}
        self._unsettled: set[str] = set()

    def header(self, name: str) -> ImageHeader:
        """Give the head of an image, as :func:`read_header`.

        Raises:
            ImageError: If the file is not an image that can be used.
        """
        facts = self._image_facts(name)
        if facts.header is None:
            facts.header, self.changed = read_header(self._file(name)), True
        return facts.header

    def check_pixels(self, name: str) -> None:
        """Decode an image that was never decoded before.

        Raises:
            ImageError: If it cannot be decoded.
        """
        facts = self._image_facts(name)
        if not facts.sound:
            load_image(self._file(name))
            facts.sound = self.changed = True

    def check(self, name: str, read: Callable[[], object]) -> None:
        """Read a file that was never found sound before.

        Args:
            name: The file.
            read: Reads it, and raises an exception if it is not sound.

        A file that is not there, or no file, is read as well, and found so.
        """
        try:
            facts = self.facts(name)
        except OSError:
            read()
            return
        if not facts.sound:
            read()
            facts.sound = self.changed = True

    def forget(self, name: str) -> None:
        """Believe nothing of a file any more, which turned out not to be sound."""
        self.changed = self._used.pop(name, None) is not None or self.changed

    def caption(self, name: str) -> CaptionFile:
        """Give the content of a caption file, as :func:`read_caption`.

        Raises:
            CaptionError: If no encoding fits.
            OSError: If the file cannot be read.
        """
        facts = self.facts(name)
        if facts.caption is None:
            facts.caption, self.changed = read_caption(self._file(name)), True
        return facts.caption

    def content(self, name: str) -> str:
        """Give a hash of all bytes of a file.

        Raises:
            OSError: If it cannot be read.
        """
        facts = self.facts(name)
        if facts.content is None:
            with self._file(name).open("rb") as file:
                facts.content = hashlib.file_digest(file, _hash).hexdigest()
            self.changed = True
        return facts.content

    def recall_image(self, name: str, *, decoded: bool) -> ImageHeader | None:
        """Give what :meth:`header` would, and :meth:`check_pixels` need not open, if known."""
        try:
            facts = self.facts(name)
        except OSError:
            return None
        return facts.header if facts.sound or not decoded else None

    def recall_caption(self, name: str) -> CaptionFile | None:
        """Give what :meth:`caption` would, if the file need not be opened for it."""
        try:
            return self.facts(name).caption
        except OSError:
            return None

    def facts(self, name: str) -> FileFacts:
        """Give what is known of a file as it was when this was first asked.

        Raises:
            OSError: If it is not there, or no file.
        """
        known = self._used.get(name)
        if known is not None:
            return known
        status = self._status(name)
        stamp = _stamp(status)
        known = self._kept.get(name)
        if known is None or known.stamp != stamp:
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "is not a regular file")
            known = FileFacts(stamp)
            if not _is_settled(stamp):
                self._unsettled.add(name)
        self._used[name] = known
        return known

    def is_unchanged(self, name: str) -> bool:
        """Tell whether a file is still as it was when it was first asked for."""
        return _stamp(self._status(name)) == self._used[name].stamp

    def to_keep(self) -> dict[str, FileFacts]:
        """Give the facts that may be believed at the next start."""
        return {
            name: facts
            for name, facts in self._used.items()
            if name not in self._unsettled and _is_unicode(name)
        }

    def _image_facts(self, name: str) -> FileFacts:
        try:
            return self.facts(name)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}") from None

    def _file(self, name: str) -> Path:
        return Path(self.path, name)

    def _status(self, name: str) -> os.stat_result:
        return os.stat(f"{self.path}{os.sep}{name}")  # noqa: PTH116 - a Path takes thrice as long


class ScanIndex:
    """Reads files, or recalls what reading them gave. Each file is looked at once in a process.

    Args:
        home: Folder of the index files; None: nothing is kept.
    """

    def __init__(self, home: Path | None = None) -> None:
        self.home = home
        self._folders: dict[str, FolderIndex] = {}

    def folder(self, path: Path | str) -> FolderIndex:
        """Give what is known of the files of a folder."""
        path = str(path)
        known = self._folders.get(path)
        if known is None:
            known = self._folders.setdefault(path, FolderIndex(path, self._kept(path)))
        return known

    def content(self, path: Path) -> str:
        """Give a hash of all bytes of a file.

        Raises:
            OSError: If it cannot be read.
        """
        return self.folder(path.parent).content(path.name)

    def is_unchanged(self, path: Path) -> bool:
        """Tell whether a file is as it was when it was first asked for."""
        return self.folder(path.parent).is_unchanged(path.name)

    def save(self) -> str | None:
        """Keep what is new for the next start; give a remark if it cannot be written."""
        try:
            self._save()
        except OSError as error:
            return (
                "what is known of the images cannot be kept for the next start: "
                f"{error.strerror} ({self.home})"
            )
        return None

    def _save(self) -> None:
        for folder in self._folders.values():
            if self.home is not None and folder.changed:
                self.home.mkdir(parents=True, exist_ok=True)
                replace_file(self._file(folder.path), _packed(folder.to_keep()), durable=False)
                folder.changed = False

    def _kept(self, folder: str) -> dict[str, FileFacts]:
        """Read the index of a folder; one that is damaged, or of another version, is none."""
        if self.home is None:
            return {}
        try:
            return _unpacked(self._file(folder).read_bytes())
        except (OSError, ValueError, IndexError):
            return {}

    def _file(self, folder: str) -> Path:
        assert self.home is not None
        name = _hash(os.fsencode(os.path.realpath(folder))).hexdigest()
        return self.home / f"{name}.json"


def user_index() -> ScanIndex:
    """Give the index in the user's cache folder."""
    return ScanIndex(user_cache() / "scan")


def user_cache() -> Path:
    """Give this program's folder for what can be made again: ``~/.cache/sdxl-train``."""
    given = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(given) if given else Path.home() / ".cache") / "sdxl-train"


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _is_settled(stamp: Stamp) -> bool:
    """Tell whether a write from now on must show in the stamp."""
    times = stamp[1:3]
    coarse = all(moment % 1_000_000_000 == 0 for moment in times)
    return max(times) < time.time_ns() - (_COARSE_TICK_NS if coarse else _TICK_NS)


def _is_unicode(name: str) -> bool:
    """Tell whether a name can be written as JSON: file systems allow any bytes."""
    return name.isascii() or name.encode("utf-8", "ignore").decode() == name


def _hash(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=16)


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """The facts on files as a file holds them, one list for each; that reads five times faster.

    What many files share, or most have none of, stands in a table of its own.
    """

    format: int
    names: list[str]
    stamps: list[Stamp]
    header_kinds: list[ImageHeader]
    headers: list[int | None]
    """Index into ``header_kinds``."""
    captions: list[tuple[str, ...] | None]
    """The lines."""
    odd_captions: dict[int, CaptionFile]
    """Captions that are more than their lines, by index."""
    contents: list[str | None]
    sound: list[bool]


@cache
def _columns() -> TypeAdapter[_Columns]:
    from pydantic import TypeAdapter

    return TypeAdapter(_Columns)


def _packed(facts: dict[str, FileFacts]) -> bytes:
    every = list(facts.values())
    kinds = {fact.header: None for fact in every if fact.header is not None}
    numbers = {header: number for number, header in enumerate(kinds)}
    captions = [fact.caption for fact in every]
    columns = _Columns(
        format=_FORMAT,
        names=list(facts),
        stamps=[fact.stamp for fact in every],
        header_kinds=list(kinds),
        headers=[None if fact.header is None else numbers[fact.header] for fact in every],
        captions=[None if caption is None else caption.lines for caption in captions],
        odd_captions={
            number: caption
            for number, caption in enumerate(captions)
            if caption is not None and caption != CaptionFile(lines=caption.lines)
        },
        contents=[fact.content for fact in every],
        sound=[fact.sound for fact in every],
    )
    return _columns().dump_json(columns)


def _unpacked(data: bytes) -> dict[str, FileFacts]:
    """Read what :func:`_packed` wrote.

    Raises:
        ValueError: If it is damaged, or of another version.
        IndexError: If it is damaged so that lists do not fit each other.
    """
    columns = _columns().validate_json(data)
    if columns.format != _FORMAT:
        raise ValueError("another version")
    kinds, odd = columns.header_kinds, columns.odd_captions
    rows = zip(
        columns.names,
        columns.stamps,
        columns.headers,
        columns.captions,
        columns.contents,
        columns.sound,
        strict=True,
    )
    facts = {
        name: FileFacts(
            stamp,
            None if header is None else kinds[header],
            None if lines is None else CaptionFile(lines=lines),
            content,
            sound,
        )
        for name, stamp, header, lines, content, sound in rows
    }
    for number, caption in odd.items():
        facts[columns.names[number]].caption = caption
    return facts
