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
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_train.data.captions import read_caption
from sdxl_train.data.file_facts import FileFacts, KeptFacts, mark_of, packed, stamp_of
from sdxl_train.data.images import ImageError, load_image, read_header
from sdxl_train.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sdxl_train.data.captions import CaptionFile
    from sdxl_train.data.file_facts import Stamp
    from sdxl_train.data.images import ImageHeader

_TICK_NS = 50_000_000
"""Longest step of the clock of a file system that tells parts of a second."""
_COARSE_TICK_NS = 2_000_000_000
"""The same of one that does not (FAT counts two seconds)."""


class FolderIndex:
    """What is known of the files of a folder, which are told by their names.

    Args:
        path: The folder.
        kept: The facts kept from before.
    """

    def __init__(self, path: str, kept: KeptFacts) -> None:
        self.path = path
        self.kept = kept
        self.changed = False
        self._untouched = bytearray(len(kept.marks))
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
        self._used.pop(name, None)
        self.kept.rows.pop(name, None)
        self.changed = True

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

    def known_content(self, name: str) -> str | None:
        """Give the hash of all bytes of a file that was asked for before, if it is known."""
        if (known := self._used.get(name)) is not None:
            return known.content
        row = self.kept.rows.get(name)
        return self.kept.content(row) if row is not None and self._untouched[row] else None

    def recall(self, names: Iterable[str | None]) -> list[int | None]:
        """Give the rows of files in ``kept``, None of those that are new or were touched."""
        # What was read anew in this process is in no row.
        row_of, used, untouched = self.kept.rows.get, self._used, self._untouched
        marks, mark = self.kept.marks, mark_of
        rows: list[int | None] = []
        with _asker(self.path) as status_of:
            for name in names:
                row = None if name is None else row_of(name)
                if row is not None and name is not None and not untouched[row]:
                    try:
                        if name not in used and marks[row] == mark(status_of(name)):
                            untouched[row] = True
                        else:
                            row = None
                    except OSError:  # it has gone, which whoever opens it will say
                        row = None
                rows.append(row)
        return rows

    def facts(self, name: str) -> FileFacts:
        """Give what is known of a file as it was when this was first asked.

        Raises:
            OSError: If it is not there, or no file.
        """
        known = self._used.get(name)
        if known is None:
            known = self._used[name] = self._recalled(name) or self._new(name)
        return known

    def _recalled(self, name: str) -> FileFacts | None:
        row = self.kept.rows.get(name)
        if row is not None and not self._untouched[row]:
            (row,) = self.recall([name])
        return None if row is None else self.kept.facts(row)

    def _new(self, name: str) -> FileFacts:
        status = self._status(name)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        if not is_settled(stamp_of(status)):
            self._unsettled.add(name)
        return FileFacts(mark_of(status), status.st_size)

    def is_unchanged(self, name: str) -> bool:
        """Tell whether a file is still as it was when it was first asked for."""
        return mark_of(self._status(name)) == self.facts(name).mark

    def to_keep(self) -> dict[str, FileFacts]:
        """Give the facts that may be believed at the next start."""
        untouched = {
            name: self.kept.facts(row)
            for name, row in self.kept.rows.items()
            if self._untouched[row]
        }
        read = {
            name: facts
            for name, facts in self._used.items()
            if name not in self._unsettled and _is_unicode(name)
        }
        return untouched | read

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
                replace_file(self._file(folder.path), packed(folder.to_keep()), durable=False)
                folder.changed = False

    def _kept(self, folder: str) -> KeptFacts:
        """Read the index of a folder; one that is damaged, or of another version, is none."""
        if self.home is None:
            return KeptFacts()
        try:
            return KeptFacts.of(self._file(folder).read_bytes())
        except (OSError, ValueError):
            return KeptFacts()

    def _file(self, folder: str) -> Path:
        assert self.home is not None
        name = _hash(os.fsencode(os.path.realpath(folder))).hexdigest()
        return self.home / f"{name}.json"


@contextmanager
def _asker(folder: str) -> Iterator[Callable[[str], os.stat_result]]:
    """Give what asks the system for the status of a file in a folder, in the quickest way.

    Calls count where there are 200 000 files: with a path in text one takes a third of the time
    that it takes with a Path, and with the name in an open folder a fifth less.
    """
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:  # always on Windows; or whoever asks may not list it
        yield lambda name: os.stat(f"{folder}{os.sep}{name}")  # noqa: PTH116
        return
    try:
        yield partial(os.stat, dir_fd=opened)
    finally:
        os.close(opened)


def user_index() -> ScanIndex:
    """Give the index in the user's cache folder."""
    return ScanIndex(user_cache() / "scan")


def user_cache() -> Path:
    """Give this program's folder for what can be made again: ``~/.cache/sdxl-train``."""
    given = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(given) if given else Path.home() / ".cache") / "sdxl-train"


def is_settled(stamp: Stamp) -> bool:
    """Tell whether a write from now on must show in the stamp."""
    times = stamp[1:3]
    coarse = all(moment % 1_000_000_000 == 0 for moment in times)
    return max(times) < time.time_ns() - (_COARSE_TICK_NS if coarse else _TICK_NS)


def _is_unicode(name: str) -> bool:
    """Tell whether a name can be written as JSON: file systems allow any bytes."""
    return name.isascii() or name.encode("utf-8", "ignore").decode() == name


def _hash(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=16)
