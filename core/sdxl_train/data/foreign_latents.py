"""Latents that another program kept, taken over where they are what this one would make.

Such files do not tell of which pixels and which encoder they are. So each is compared with what the
encoder makes of the image as it is now, and only where they agree the file's latents are kept.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

import torch

from sdxl_train.data.disk_store import DiskStore
from sdxl_train.data.findings import Remarks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sdxl_train.data.cache import LatentKey
    from sdxl_train.data.entry_file import Entry
    from sdxl_train.data.records import Dataset
    from sdxl_train.data.scan_index import ScanIndex
    from sdxl_train.protocols import LatentReader

logger = logging.getLogger(__name__)

_TOLERANCE = 0.2
"""Difference of all latents, by their standard deviation: what another way to shrink an image, a
draw from the encoder's posterior and 16-bit arithmetic may make. Those of another image: about 1.4.
"""
_TILE = 8
_TILE_TOLERANCE = 0.5
"""The same of each tile of so many latents squared: an edit in a corner shows nowhere else."""


class ImportingStore(DiskStore["LatentKey"]):
    """Keeps latents that lie beside the images instead of those just made, where they agree.

    Args:
        datasets: What the keys refer to.
        reader: Reads the other program's files.
        entries: As for :class:`DiskStore`.
        index: As for :class:`DiskStore`.
        check: As for :class:`DiskStore`.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        reader: LatentReader,
        entries: Mapping[LatentKey, Entry],
        index: ScanIndex,
        *,
        check: bool,
    ) -> None:
        super().__init__("latents", entries, index, check=check)
        self._datasets = datasets
        self._reader = reader
        self._outcomes: Counter[str] = Counter()
        self._refused = Remarks()

    def put(self, key: LatentKey, tensors: dict[str, Tensor]) -> None:
        """Keep an encoding, or the other program's in its place."""
        theirs = self._theirs(key, tensors["latents"])
        super().put(key, tensors if theirs is None else {**tensors, "latents": theirs})

    def report(self) -> str:
        """Say what became of the encodings, and of the other program's."""
        told = "; ".join(f"{count} {what}" for what, count in sorted(self._outcomes.items()))
        for line in self._refused.lines():
            logger.warning("%s", line)
        return f"{super().report()}; of another program: {told or 'none found'}"

    def _theirs(self, key: LatentKey, own: Tensor) -> Tensor | None:
        image = self._datasets[key[0]].images[key[1]]
        try:
            found = self._reader.read_latents(image.path, image.size)
            if not found:
                return None
            theirs = agreeing(found.get(key[2]), own)
        except ValueError as error:
            self._outcomes["not taken over"] += 1
            self._refused.add(f"latents of another program that {error}: encoded anew", image.path)
            return None
        self._outcomes["taken over"] += 1
        return theirs


def agreeing(theirs: Tensor | None, own: Tensor) -> Tensor:
    """Give latents of another program if they agree with our own, [C, h, w].

    Raises:
        ValueError: If they do not; the message says in what.
    """
    if theirs is None:
        raise ValueError("lack the mirrored form")
    if theirs.shape != own.shape:
        raise ValueError(f"have another size, {_size(theirs)} instead of {_size(own)}")
    squares = ((theirs - own).square() / own.var()).mean(0)
    # The last tiles are cut off: an image has any multiple of the encoder's scale.
    tiles = torch.nn.functional.avg_pool2d(
        squares[None, None], min(_TILE, *squares.shape), ceil_mode=True, count_include_pad=False
    )
    # Also false where anything is not finite.
    if not (squares.mean() <= _TOLERANCE**2 and tiles.max() <= _TILE_TOLERANCE**2):
        raise ValueError("are not what the encoder makes of the image as it is now")
    return theirs


def _size(latents: Tensor) -> str:
    return "x".join(str(side) for side in latents.shape)
