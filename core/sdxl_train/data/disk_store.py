"""Encodings kept on the disk from run to run, beside the images, under what they were made of.

The path of a file follows from the content of the image (or the caption), from the weights that
encode it and from all options that shape the result. So nothing has to be compared with times or
names: what changed has another path. Files of before stay, and serve again if the change is undone.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

from sdxl_train.data.captions import possible_captions
from sdxl_train.data.entry_file import Entry, EntryError, read_origin
from sdxl_train.data.findings import Remarks
from sdxl_train.errors import TrainingError, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdxl_train.data.cache import LatentKey
    from sdxl_train.data.entry_file import Origin
    from sdxl_train.data.records import Dataset
    from sdxl_train.data.scan_index import ScanIndex

logger = logging.getLogger(__name__)

PREPARATION = "upright RGB on white; shrunk by Hamming, enlarged by Lanczos"
"""What :mod:`.images` does to an image; the latents of another preparation are others."""

K = TypeVar("K")


class DiskStore(Generic[K]):
    """Keeps encodings in files. What is there at the start is checked.

    Args:
        title: What is kept, for messages.
        entries: The file of each encoding.
        index: Knows which files were found sound before, and learns it of others.
        check: Read every file at the start that was not read before. Otherwise a damaged one shows
            when it is needed.
    """

    def __init__(
        self, title: str, entries: Mapping[K, Entry], index: ScanIndex, *, check: bool
    ) -> None:
        self.title = title
        self.entries = entries
        self.tally: Counter[str] = Counter()
        self._index = index
        self._check = check
        self._remarks = Remarks()
        self._files = _Folders({entry.folder for entry in entries.values()})
        self._damaged: set[K] = set()
        with ThreadPoolExecutor(thread_name_prefix="cache") as pool:
            sound = list(pool.map(self._is_sound, entries))
        self._held = {key for key, is_held in zip(entries, sound, strict=True) if is_held}
        for line in self._remarks.lines():
            logger.warning("%s", line)
        if missing := len(entries) - len(self._held):
            logger.info("%s on disk: %d to make%s", title, missing, self._reasons())

    def __contains__(self, key: K) -> bool:
        """Tell whether an encoding need not be made."""
        return key in self._held

    def put(self, key: K, tensors: dict[str, Tensor]) -> None:
        """Keep an encoding.

        Raises:
            UserError: If it cannot be written.
        """
        entry = self.entries[key]
        try:
            entry.write(tensors)
        except OSError as error:
            raise UserError.of(
                str(entry.folder),
                f"the cache cannot be written: {error.strerror}",
                "make room or change the permissions, or cache in memory: leave out "
                "--cache_latents_to_disk and --cache_text_encoder_outputs_to_disk",
            ) from None
        self._held.add(key)

    def adopt(self, key: K, tensors: dict[str, Tensor]) -> None:
        """Take an encoding that another process has made: its file, or without it the tensors.

        Raises:
            UserError: If it cannot be written.
        """
        # On another machine the file may be missing still, or be the damaged one.
        if key in self._damaged or not self.entries[key].path.is_file():
            self.put(key, tensors)
        else:
            self._held.add(key)

    def get(self, key: K) -> dict[str, Tensor]:
        """Read an encoding that is held.

        Raises:
            TrainingError: If its file was damaged or removed since.
        """
        entry = self.entries[key]
        try:
            return entry.read()
        except EntryError as error:
            self._index.folder(entry.folder).forget(entry.name)
            self._index.save()
            way = "" if self._check else " without --skip_cache_check"
            raise TrainingError(
                f"{entry.path}: {error}; start again{way}, and it is made anew"
            ) from None

    def report(self) -> str:
        """Say what became of the encodings: ``latents on disk: 1 rebuilt (damaged), 4 reused``."""
        parts = [f"{count} {what}" for what, count in sorted(self.tally.items())]
        return f"{self.title} on disk: " + (", ".join(parts) or "none needed")

    def _reasons(self) -> str:
        told = [
            f"{what.removeprefix('rebuilt (').rstrip(')')}: {count}"
            for what, count in sorted(self.tally.items())
            if what.startswith("rebuilt")
        ]
        return f" ({', '.join(told)})" if told else ""

    def _is_sound(self, key: K) -> bool:
        entry = self.entries[key]
        if self._files.has(entry):
            try:
                if self._check:
                    self._index.folder(entry.folder).check(entry.name, entry.read)
            except EntryError as error:
                self._remarks.add(f"a cached encoding {error}; it is made anew", entry.path)
                self.tally["rebuilt (damaged)"] += 1
                self._damaged.add(key)
                return False
            self.tally["reused"] += 1
            return True
        changed = entry.changed_since(self._files.before(entry))
        self.tally[f"rebuilt ({' and '.join(changed)} changed)" if changed else "built"] += 1
        return False


class _Folders:
    """The files in cache folders, as they were at the start."""

    def __init__(self, folders: set[Path]) -> None:
        self._slots = {folder: _by_slot(folder) for folder in folders}
        self._captions: dict[Path, dict[str, list[Origin]]] = {}
        self._reading = Lock()

    def has(self, entry: Entry) -> bool:
        """Tell whether the file of an entry is there."""
        return entry.name in self._slots[entry.folder].get(entry.slot, ())

    def before(self, entry: Entry) -> list[Origin]:
        """Give what other encodings there are of the same thing; of a caption, of its image."""
        names = self._slots[entry.folder].get(entry.slot, ())
        if not names and entry.kind == "text" and entry.subject:
            return self._captions_of(entry.folder).get(entry.image_digest, [])
        origins = (read_origin(entry.folder / name) for name in names)
        return [origin for origin in origins if origin is not None]

    def _captions_of(self, folder: Path) -> dict[str, list[Origin]]:
        """Give all encodings of captions in a folder by their images: what they had before."""
        with self._reading:
            if folder not in self._captions:
                found = self._captions[folder] = {}
                for slot, names in self._slots[folder].items():
                    for name in names if slot.startswith("text-") else ():
                        if origin := read_origin(folder / name):
                            found.setdefault(origin.image, []).append(origin)
            return self._captions[folder]


def _by_slot(folder: Path) -> dict[str, list[str]]:
    slots: dict[str, list[str]] = {}
    with suppress(FileNotFoundError, NotADirectoryError):
        for name in sorted(os.listdir(folder)):  # noqa: PTH208 - paths take ten times as long
            slots.setdefault(name.rpartition("-")[0] + "-", []).append(name)
    return slots


def latent_entries(
    datasets: Sequence[Dataset],
    keys: Sequence[LatentKey],
    index: ScanIndex,
    encoder: Mapping[str, str],
) -> dict[LatentKey, Entry]:
    """Give the files of latents.

    Args:
        datasets: What the keys refer to.
        keys: Dataset, image, mirrored.
        index: Knows or learns what the images hold.
        encoder: Identity of the image encoder, by titles for messages.

    Raises:
        TrainingError: If an image cannot be read.
    """
    images = [datasets[key[0]].images[key[1]] for key in keys]
    # Masks are kept with the latents, in their size.
    files = [path for image in images for path in (image.path, image.mask) if path is not None]
    paths = list(dict.fromkeys(files))
    try:
        with ThreadPoolExecutor(thread_name_prefix="hash") as pool:
            contents = dict(zip(paths, pool.map(index.content, paths), strict=True))
    except OSError as error:
        raise TrainingError(f"{error.filename}: cannot be read: {error.strerror}") from None
    entries = {}
    for dataset, number, flipped in keys:
        image = datasets[dataset].images[number]
        fit, subset = image.fit, datasets[dataset].subset_of(image)
        mask = contents[image.mask] if image.mask else "none"
        entries[dataset, number, flipped] = Entry(
            image=image.path,
            kind="latents",
            subject=f"{'mirrored ' if flipped else ''}{image.path.name}",
            facts={
                "the image": contents[image.path],
                "the resolution": f"{fit.resized} cut at {fit.crop} to {fit.bucket}",
                "the mask": "alpha" if subset.alpha_mask else mask,
                "the preparation": PREPARATION,
                "the interpolation": subset.resize_interpolation or "by size",
                **encoder,
            },
        )
    return entries


def text_entries(datasets: Sequence[Dataset], encoders: Mapping[str, str]) -> dict[str, Entry]:
    """Give the files of encoded captions, each beside the first image that has the caption.

    Args:
        datasets: Have the captions.
        encoders: Identity of the text encoders and of how they encode, by titles for messages.
    """
    entries: dict[str, Entry] = {}
    for dataset in datasets:
        for image in dataset.images:
            for caption in possible_captions(image.caption, dataset.subset_of(image).captions):
                if caption not in entries:
                    entries[caption] = Entry(
                        image=image.path,
                        kind="text",
                        subject=caption,
                        facts=encoders,
                    )
    return entries


def check_unchanged(index: ScanIndex, path: Path) -> None:
    """Make sure that an image is what it was when it was hashed.

    Raises:
        TrainingError: If it was written to since.
    """
    try:
        unchanged = index.is_unchanged(path)
    except OSError:
        unchanged = False
    if not unchanged:
        raise TrainingError(f"{path}: has changed since the start; start again")
