"""Files that torch wrote, read without running anything that is in them."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from sdxl_train.ldm.headers import BadFileError, refuse_other_formats

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` file, on the CPU.

    torch builds tensors and plain containers only; anything else in the file is refused.

    Raises:
        BadFileError: If it cannot be read, is damaged, or holds more than tensors.
    """
    try:
        stat = path.stat()
        return _read(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise BadFileError(f"{path.name} cannot be read: {error.strerror}") from error


@lru_cache(maxsize=2)
def _read(path: Path, size: int, _modified: int) -> dict[str, Tensor]:
    """Read once for each state of a file."""
    if size == 0:
        raise BadFileError(f"{path.name} is empty (0 bytes)", "download it again")
    with path.open("rb") as file:
        start = file.read(512)
    refuse_other_formats(path, start, pickles=False)
    if start[8:9] == b"{":
        raise BadFileError(
            f"{path.name} is a safetensors file named {path.suffix}", "rename it to .safetensors"
        )
    try:
        with warnings.catch_warnings():
            # Of pickle protocols that its restricted reader might not know: then it fails.
            warnings.simplefilter("ignore")
            # Mapped where it can be: a base model is not read for its header.
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise BadFileError(
            f"{path.name} holds more than tensors, which is never unpickled: it could run any code",
            "convert it to .safetensors where you trust it",
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise BadFileError(
            f"{path.name} is no file that torch wrote, or it is damaged", "download it again"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in content.items()
    ):
        raise BadFileError(f"{path.name} holds no table of tensors")
    return content
