"""Reading the heads of many images and their captions at once; faults are values here."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from sdxl_train.data.captions import CaptionError
from sdxl_train.data.images import ImageError
from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sdxl_train.data.captions import CaptionFile
    from sdxl_train.data.images import ImageHeader
    from sdxl_train.data.scan_index import ScanIndex

_Files: TypeAlias = "tuple[Path, Path | None, Path | None]"
"""An image, its caption file and its mask."""

_AT_ONCE = 100
"""Images of one task: a task for each image would take longer to hand over than to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """What was read of one image."""

    path: Path
    caption_path: Path | None
    mask_path: Path | None
    header: ImageHeader | ImageError
    caption: CaptionFile | Problem | None
    mask: ImageHeader | ImageError | None


class Reader:
    """Reads in threads; a context manager that ends them.

    Args:
        index: Recalls what was read before.
        decode: Decode each image once, to find out what its head does not tell.
    """

    def __init__(self, index: ScanIndex, *, decode: bool = False) -> None:
        self.index = index
        self.decode = decode
        # Heads wait for the disk or the network, pixels keep the cores busy.
        cores = os.cpu_count() or 1
        threads = cores if decode else min(32, 4 * cores)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="scan")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(
        self,
        images: Sequence[Path],
        captions: Sequence[Path | None],
        masks: Sequence[Path | None],
    ) -> Iterator[Read]:
        """Read images with their caption files and masks, in their order."""
        files = list(zip(images, captions, masks, strict=True))
        parts = [files[at : at + _AT_ONCE] for at in range(0, len(files), _AT_ONCE)]
        # What is known needs no waiting, and threads only get in each other's way.
        tasks = [
            None if self._known(part) else self._pool.submit(self._some, part) for part in parts
        ]
        for part, task in zip(parts, tasks, strict=True):
            yield from self._some(part) if task is None else task.result()

    def _known(self, files: Sequence[_Files]) -> bool:
        return all(
            self.index.knows_image(image, decoded=self.decode)
            and (caption is None or self.index.knows_caption(caption))
            and (mask is None or self.index.knows_image(mask, decoded=self.decode))
            for image, caption, mask in files
        )

    def _some(self, files: Sequence[_Files]) -> list[Read]:
        return [
            Read(
                path=path,
                caption_path=caption,
                mask_path=mask,
                header=self._header(path),
                caption=self._caption(caption) if caption else None,
                mask=self._header(mask) if mask else None,
            )
            for path, caption, mask in files
        ]

    def _header(self, path: Path) -> ImageHeader | ImageError:
        try:
            header = self.index.header(path)
            if self.decode:
                self.index.check_pixels(path)
        except ImageError as error:
            return error
        return header

    def _caption(self, path: Path) -> CaptionFile | Problem:
        try:
            return self.index.caption(path)
        except CaptionError as error:
            return Problem(place=str(path), message=str(error))
        except OSError as error:
            return Problem(place=str(path), message=f"cannot be read: {error.strerror}")
