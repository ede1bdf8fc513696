"""Encodings kept on the disk from run to run, beside the images, under what they were made of.

The path of a file follows from the content of the image (or the caption), from the weights that
encode it and from all options that shape the result. So nothing has to be compared with times or
names: what changed has another path. Files of before stay, and serve again if the change is undone.
"""

from __future__ import annotations

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

from sdxl_train.data.captions import possible_captions
from sdxl_train.data.entry_file import Entry, EntryError
from sdxl_train.data.findings import Remarks
from sdxl_train.errors import TrainingError, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdxl_train.data.cache import LatentKey
    from sdxl_train.data.records import Dataset
    from sdxl_train.data.scan_index import ScanIndex

logger = logging.getLogger(__name__)

PREPARATION = "upright RGB on white; shrunk by Hamming, enlarged by Lanczos"
"""What :mod:`.images` does to an image; the latents of another preparation are others."""

K = TypeVar("K")


class DiskStore(Generic[K]):
    """Keeps encodings in files. What is there at the start is checked, and told in one line.

    Args:
        title: What is kept, for messages.
        entries: The file of each encoding.
        check: Read every file at the start. Otherwise a damaged one shows when it is needed.
    """

    def __init__(self, title: str, entries: Mapping[K, Entry], *, check: bool) -> None:
        self.title = title
        self.entries = entries
        self.tally: Counter[str] = Counter()
        self._remarks = Remarks()
        self._files = _Folders({entry.folder for entry in entries.values()})
        with ThreadPoolExecutor(thread_name_prefix="cache") as pool:
            sound = list(pool.map(lambda entry: self._is_sound(entry, check), entries.values()))
        self._held = {key for key, is_held in zip(entries, sound, strict=True) if is_held}
        for line in self._remarks.lines():
            logger.warning("%s", line)
        logger.info("%s", self.report())

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

    def get(self, key: K) -> dict[str, Tensor]:
        """Read an encoding that is held.

        Raises:
            TrainingError: If its file was damaged or removed since.
        """
        entry = self.entries[key]
        try:
            return entry.read()
        except EntryError as error:
            raise TrainingError(
                f"{entry.path}: {error}; start again without --skip_cache_check, and it is made "
                "anew"
            ) from None

    def report(self) -> str:
        """Say in one line what was found: ``latents: 4 reused, 1 rebuilt (the image changed)``."""
        parts = [f"{count} {what}" for what, count in sorted(self.tally.items())]
        return f"{self.title} on disk: " + (", ".join(parts) or "none needed")

    def _is_sound(self, entry: Entry, check: bool) -> bool:
        if self._files.has(entry):
            try:
                if check:
                    entry.read()
            except EntryError as error:
                self._remarks.add(f"a cached encoding {error}; it is made anew", entry.path)
                self.tally["rebuilt (damaged)"] += 1
                return False
            self.tally["reused"] += 1
            return True
        earlier = self._files.of_slot(entry)
        changed = entry.changed_since(earlier) if earlier else []
        self.tally[f"rebuilt ({' and '.join(changed)} changed)" if changed else "built"] += 1
        return False


class _Folders:
    """The names of the files in cache folders, by slot, as they were at the start."""

    def __init__(self, folders: set[Path]) -> None:
        self._slots: dict[tuple[Path, str], set[str]] = {}
        for folder in folders:
            for path in folder.iterdir() if folder.is_dir() else ():
                slot = path.name.rpartition("-")[0] + "-"
                self._slots.setdefault((folder, slot), set()).add(path.name)

    def of_slot(self, entry: Entry) -> list[str]:
        return sorted(self._slots.get((entry.folder, entry.slot), ()))

    def has(self, entry: Entry) -> bool:
        return entry.name in self._slots.get((entry.folder, entry.slot), ())


def latent_entries(
    datasets: Sequence[Dataset], keys: Sequence[LatentKey], index: ScanIndex, encoder: str
) -> dict[LatentKey, Entry]:
    """Give the files of latents.

    Args:
        datasets: What the keys refer to.
        keys: Dataset, image, mirrored.
        index: Knows or learns what the images hold.
        encoder: Identity of the image encoder.

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
            images=image.path.parent,
            kind="latents",
            subject=f"{'mirrored ' if flipped else ''}{image.path.name}",
            facts={
                "the image": contents[image.path],
                "the resolution": f"{fit.resized} cut at {fit.crop} to {fit.bucket}",
                "the mask": "alpha" if subset.alpha_mask else mask,
                "the preparation": PREPARATION,
                "the interpolation": subset.resize_interpolation or "by size",
                "the VAE": encoder,
            },
        )
    return entries


def text_entries(datasets: Sequence[Dataset], encoders: str) -> dict[str, Entry]:
    """Give the files of encoded captions, each beside the first image that has the caption.

    Args:
        datasets: Have the captions.
        encoders: Identity of the text encoders and of how they encode.
    """
    entries: dict[str, Entry] = {}
    for dataset in datasets:
        for image in dataset.images:
            for caption in possible_captions(image.caption, dataset.subset_of(image).captions):
                if caption not in entries:
                    entries[caption] = Entry(
                        images=image.path.parent,
                        kind="text",
                        subject=caption,
                        facts={"the text encoders": encoders},
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
