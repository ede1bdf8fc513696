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
from typing import TYPE_CHECKING

from sdxl_train.data.captions import CaptionFile, read_caption
from sdxl_train.data.images import ImageError, ImageHeader, load_image, read_header
from sdxl_train.files import replace_file

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_FORMAT = 3
"""Another one when a reader of files gives something else than before."""
_TICK_NS = 50_000_000
"""Longest step of the clock of a file system that tells parts of a second."""
_COARSE_TICK_NS = 2_000_000_000
"""The same of one that does not (FAT counts two seconds)."""


@dataclass(slots=True)
class FileFacts:
    """What is known of a file.

    Attributes:
        stamp: Size, times of modification and of change in ns, inode.
        header: The head of an image.
        caption: The content of a caption file.
        content: Hash of all its bytes.
        decodes: Whether it was decoded as an image without a fault.
    """

    stamp: tuple[int, int, int, int]
    header: ImageHeader | None = None
    caption: CaptionFile | None = None
    content: str | None = None
    decodes: bool = False


class _Folder:
    """The facts on the files of a folder: those kept from before, and those in use now."""

    def __init__(self, path: str, kept: dict[str, FileFacts]) -> None:
        self.path = path
        self.kept = kept
        self.used: dict[str, FileFacts] = {}
        self.unsettled: set[str] = set()
        self.changed = False

    def facts(self, name: str) -> FileFacts:
        """Give what is known of a file as it was when this was first asked.

        Raises:
            OSError: If it is not there, or no file.
        """
        known = self.used.get(name)
        if known is not None:
            return known
        status = self._status(name)
        stamp = _stamp(status)
        known = self.kept.get(name)
        if known is None or known.stamp != stamp:
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "is not a regular file")
            known = FileFacts(stamp)
            if not _is_settled(stamp):
                self.unsettled.add(name)
        self.used[name] = known
        return known

    def is_unchanged(self, name: str) -> bool:
        """Tell whether a file is still as it was when it was first asked for."""
        return _stamp(self._status(name)) == self.used[name].stamp

    def to_keep(self) -> dict[str, FileFacts]:
        """Give the facts that may be believed at the next start."""
        return {
            name: facts
            for name, facts in self.used.items()
            if name not in self.unsettled and _is_unicode(name)
        }

    def _status(self, name: str) -> os.stat_result:
        return os.stat(f"{self.path}{os.sep}{name}")  # noqa: PTH116 - a Path takes thrice as long


class ScanIndex:
    """Reads files, or recalls what reading them gave. Each file is looked at once in a process.

    Args:
        home: Folder of the index files; None: nothing is kept.
    """

    def __init__(self, home: Path | None = None) -> None:
        self.home = home
        self._folders: dict[str, _Folder] = {}

    def header(self, path: Path) -> ImageHeader:
        """Give the head of an image, as :func:`read_header`.

        Raises:
            ImageError: If the file is not an image that can be used.
        """
        folder, facts = self._image_facts(path)
        if facts.header is None:
            facts.header, folder.changed = read_header(path), True
        return facts.header

    def check_pixels(self, path: Path) -> None:
        """Decode an image that was never decoded before.

        Raises:
            ImageError: If it cannot be decoded.
        """
        folder, facts = self._image_facts(path)
        if not facts.decodes:
            load_image(path)
            facts.decodes = folder.changed = True

    def caption(self, path: Path) -> CaptionFile:
        """Give the content of a caption file, as :func:`read_caption`.

        Raises:
            CaptionError: If no encoding fits.
            OSError: If the file cannot be read.
        """
        folder, facts = self._facts(path)
        if facts.caption is None:
            facts.caption, folder.changed = read_caption(path), True
        return facts.caption

    def content(self, path: Path) -> str:
        """Give a hash of all bytes of a file.

        Raises:
            OSError: If it cannot be read.
        """
        folder, facts = self._facts(path)
        if facts.content is None:
            with path.open("rb") as file:
                facts.content = hashlib.file_digest(file, _hash).hexdigest()
            folder.changed = True
        return facts.content

    def knows_image(self, path: Path, *, decoded: bool) -> bool:
        """Tell whether :meth:`header`, and :meth:`check_pixels`, need not open the file."""
        try:
            facts = self._facts(path)[1]
        except OSError:
            return False
        return facts.header is not None and (facts.decodes or not decoded)

    def knows_caption(self, path: Path) -> bool:
        """Tell whether :meth:`caption` need not open the file."""
        try:
            return self._facts(path)[1].caption is not None
        except OSError:
            return False

    def num_bytes(self, path: Path) -> int:
        """Give the length of a file.

        Raises:
            OSError: If it is not there.
        """
        return self._facts(path)[1].stamp[0]

    def is_unchanged(self, path: Path) -> bool:
        """Tell whether a file is as it was when it was first asked for."""
        parent, name = os.path.split(path)
        return self._folders[parent].is_unchanged(name)

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
                data = _adapter().dump_json((_FORMAT, folder.to_keep()), exclude_none=True)
                replace_file(self._file(folder.path), data, durable=False)
                folder.changed = False

    def _image_facts(self, path: Path) -> tuple[_Folder, FileFacts]:
        try:
            return self._facts(path)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}") from None

    def _facts(self, path: Path) -> tuple[_Folder, FileFacts]:
        parent, name = os.path.split(path)
        folder = self._folders.get(parent)
        if folder is None:
            folder = self._folders.setdefault(parent, _Folder(parent, self._kept(parent)))
        return folder, folder.facts(name)

    def _kept(self, folder: str) -> dict[str, FileFacts]:
        """Read the index of a folder; one that is damaged, or of another version, is none."""
        if self.home is None or not self._file(folder).is_file():
            return {}
        try:
            format_, kept = _adapter().validate_json(self._file(folder).read_bytes())
        except (OSError, ValueError):
            return {}
        return kept if format_ == _FORMAT else {}

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


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _is_settled(stamp: tuple[int, int, int, int]) -> bool:
    """Tell whether a write from now on must show in the stamp."""
    times = stamp[1:3]
    coarse = all(moment % 1_000_000_000 == 0 for moment in times)
    return max(times) < time.time_ns() - (_COARSE_TICK_NS if coarse else _TICK_NS)


def _is_unicode(name: str) -> bool:
    """Tell whether a name can be written as JSON: file systems allow any bytes."""
    return name.isascii() or name.encode("utf-8", "ignore").decode() == name


def _hash(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=16)


@cache
def _adapter() -> TypeAdapter[tuple[int, dict[str, FileFacts]]]:
    from pydantic import TypeAdapter

    return TypeAdapter(tuple[int, dict[str, FileFacts]])
