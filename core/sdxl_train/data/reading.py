"""Reading the heads of many images and their captions at once; faults are values here."""

from __future__ import annotations

import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
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
    """What was read of one image: its length, its head, its caption and the head of its mask."""

    folder: Path
    mask_folder: Path
    names: _Names
    num_bytes: int
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
        read = reading.recall(files)
        new = [number for number, known in enumerate(read) if known is None]
        parts = [
            [files[number] for number in new[at : at + _AT_ONCE]]
            for at in range(0, len(new), _AT_ONCE)
        ]
        opened = chain.from_iterable(self._open(reading, parts))
        return (known or next(opened) for known in read)

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

    def recall(self, files: Sequence[_Names]) -> list[Read | None]:
        """Give the images of which nothing need be opened, None for the others."""
        images, captions, masks = zip(*files, strict=True) if files else ((), (), ())
        rows = zip(
            files,
            self.files.recall(images),
            self.files.recall(captions),
            self.masks.recall(masks) if any(masks) else repeat(None),
            strict=False,
        )
        return [self._recalled(*of_image) for of_image in rows]

    def _recalled(
        self, names: _Names, image: int | None, caption: int | None, mask: int | None
    ) -> Read | None:
        kept, masks = self.files.kept, self.masks.kept
        if image is None or (self.decode and not kept.sound[image]):
            return None
        header, text, mask_header = kept.headers[image], None, None
        if header is None:
            return None
        if names[1] and (caption is None or (text := kept.caption(caption)) is None):
            return None
        if names[2] and (
            mask is None
            or (self.decode and not masks.sound[mask])
            or (mask_header := masks.headers[mask]) is None
        ):
            return None
        return Read(
            self.folder, self.mask_folder, names, kept.num_bytes[image], header, text, mask_header
        )

    def some(self, files: Sequence[_Names]) -> list[Read]:
        """Read images."""
        return [self._read(*names) for names in files]

    def _read(self, image: str, caption: str | None, mask: str | None) -> Read:
        header = self._header(self.files, image)
        return Read(
            self.folder,
            self.mask_folder,
            (image, caption, mask),
            0 if isinstance(header, ImageError) else self.files.facts(image).num_bytes,
            header,
            self._caption(caption) if caption else None,
            self._header(self.masks, mask) if mask else None,
        )

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
