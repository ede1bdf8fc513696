"""Reading the heads of many images and their captions at once; faults are values here."""

from __future__ import annotations

import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from sdxl_train.data.captions import CaptionError
from sdxl_train.data.images import ImageError
from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sdxl_train.data.captions import CaptionFile
    from sdxl_train.data.images import ImageHeader
    from sdxl_train.data.scan_index import FolderIndex, ScanIndex

_Names: TypeAlias = tuple[str, str | None, str | None]
"""The names of an image, its caption file and its mask."""

_AT_ONCE = 100
"""Images of one task: a task for each image would take longer to hand over than to do."""
_WAITING = 3
"""A disk or network is waited for where reading takes this many times longer than computing."""


class Read(NamedTuple):
    """What was read of one image: its head, its caption and the head of its mask."""

    folder: Path
    mask_folder: Path
    names: _Names
    header: ImageHeader | ImageError
    caption: CaptionFile | Problem | None
    mask: ImageHeader | ImageError | None

    @property
    def path(self) -> Path:
        """The image. Paths are made when asked for: 100 000 take half a second."""
        return self.folder / self.names[0]

    @property
    def caption_path(self) -> Path | None:
        """Its caption file."""
        return self.folder / self.names[1] if self.names[1] else None

    @property
    def mask_path(self) -> Path | None:
        """Its mask."""
        return self.mask_folder / self.names[2] if self.names[2] else None


class Reader:
    """Reads images with their captions and masks.

    Args:
        index: Recalls what was read before.
        decode: Decode each image once, to find out what its head does not tell.
    """

    def __init__(self, index: ScanIndex, *, decode: bool = False) -> None:
        self.index = index
        self.decode = decode

    def read(
        self,
        folder: Path,
        images: Sequence[str],
        captions: Sequence[str | None],
        masks: Sequence[str | None],
        mask_folder: Path | None = None,
    ) -> Iterator[Read]:
        """Read images with their caption files and masks, in their order.

        Args:
            folder: Holds the images and captions.
            images: Names of the images.
            captions: Of each, the name of its caption file.
            masks: Of each, the name of its mask.
            mask_folder: Holds the masks.
        """
        reading = _Reading(self.index, folder, mask_folder or folder, decode=self.decode)
        files = list(zip(images, captions, masks, strict=True))
        parts = [files[at : at + _AT_ONCE] for at in range(0, len(files), _AT_ONCE)]
        read = [reading.recall(part) for part in parts]
        new = [number for number, known in enumerate(read) if known is None]
        for number, part in zip(new, self._open(reading, [parts[n] for n in new]), strict=True):
            read[number] = part
        return chain.from_iterable(part for part in read if part is not None)

    def _open(self, reading: _Reading, parts: Sequence[list[_Names]]) -> Iterator[list[Read]]:
        """Read parts, in threads where these are of use.

        Decoding keeps all cores busy. Heads and captions are little work: where nothing waits for
        a disk, threads get in each other's way and take twice as long as one alone.
        """
        left = deque(parts)
        while left and not self.decode:
            began, computed = time.perf_counter(), time.thread_time()
            yield reading.some(left.popleft())
            if time.perf_counter() - began > _WAITING * (time.thread_time() - computed):
                break
        if not left:
            return
        cores = os.cpu_count() or 1
        pool = ThreadPoolExecutor(cores if self.decode else min(32, 4 * cores), "scan")
        try:
            yield from pool.map(reading.some, left)
        finally:
            pool.shutdown(cancel_futures=True)


class _Reading:
    """Reads images of one folder."""

    def __init__(self, index: ScanIndex, folder: Path, mask_folder: Path, *, decode: bool) -> None:
        self.folder = folder
        self.mask_folder = mask_folder
        self.decode = decode
        self.files = index.folder(folder)
        self.masks = index.folder(mask_folder)

    def recall(self, files: Sequence[_Names]) -> list[Read] | None:
        """Give images without opening a file, if all of them are known."""
        known = []
        for names in files:
            image, caption, mask = names
            header = self.files.recall_image(image, decoded=self.decode)
            text = self.files.recall_caption(caption) if caption else None
            mask_header = self.masks.recall_image(mask, decoded=self.decode) if mask else None
            if not header or (caption and text is None) or (mask and not mask_header):
                return None
            known.append(self._read(names, header, text, mask_header))
        return known

    def some(self, files: Sequence[_Names]) -> list[Read]:
        """Read images."""
        return [
            self._read(
                names,
                self._header(self.files, names[0]),
                self._caption(names[1]) if names[1] else None,
                self._header(self.masks, names[2]) if names[2] else None,
            )
            for names in files
        ]

    def _read(
        self,
        names: _Names,
        header: ImageHeader | ImageError,
        text: CaptionFile | Problem | None,
        mask_header: ImageHeader | ImageError | None,
    ) -> Read:
        return Read(self.folder, self.mask_folder, names, header, text, mask_header)

    def _header(self, files: FolderIndex, name: str) -> ImageHeader | ImageError:
        try:
            header = files.header(name)
            if self.decode:
                files.check_pixels(name)
        except ImageError as error:
            return error
        return header

    def _caption(self, name: str) -> CaptionFile | Problem:
        try:
            return self.files.caption(name)
        except CaptionError as error:
            return Problem(place=str(self.folder / name), message=str(error))
        except OSError as error:
            place = str(self.folder / name)
            return Problem(place=place, message=f"cannot be read: {error.strerror}")
