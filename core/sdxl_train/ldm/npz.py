"""Latents as sd-scripts keeps them: a ``.npz`` file beside each image, not yet scaled."""

from __future__ import annotations

import zipfile
import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_ARRAYS = {False: "latents", True: "latents_flipped"}


def find_npz(image: Path, size: tuple[int, int], ending: str) -> Path | None:
    """Find the file of an image of (width, height): the name of old takes precedence, as there.

    Args:
        image: The image.
        size: Its (width, height).
        ending: What a family's names end with, before ``.npz``.
    """
    width, height = size
    names = (f"{image.stem}.npz", f"{image.stem}_{width:04d}x{height:04d}{ending}.npz")
    paths = (image.with_name(name) for name in names)
    return next((path for path in paths if path.is_file()), None)


def read_npz(path: Path, size: tuple[int, int]) -> dict[bool, Tensor]:
    """Read the latents of an image, and under True those of its mirror image, if they are there.

    Returns:
        fp32 [C, h, w], unscaled.

    Raises:
        ValueError: If the file is damaged, holds something else, or is of an image of another size.
    """
    try:
        # Never unpickle: such a file can run any code.
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            # A bare array is no archive, whatever its name says.
            arrays = {} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        raise ValueError(f"({path.name}) are damaged, or no arrays") from None
    if "latents" not in arrays:
        raise ValueError(f"({path.name}) hold no latents")
    told = arrays.get("original_size")
    if told is None or [int(side) for side in np.ravel(told)] != list(size):
        raise ValueError(f"({path.name}) are of an image of another size")
    return {
        flipped: torch.from_numpy(arrays[name].astype(np.float32))
        for flipped, name in _ARRAYS.items()
        if name in arrays and arrays[name].dtype.kind == "f" and arrays[name].ndim == 3
    }
