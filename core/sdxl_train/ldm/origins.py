"""Where the values of a parameter are in a single file. Light to import."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_train.ldm import names

if TYPE_CHECKING:
    from collections.abc import Container

    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the values of a parameter are in a file.

    Attributes:
        name: The tensor in the file.
        third: Which third of its rows (query, key, value); None for all of them.
        transposed: Whether the file keeps the matrix transposed.
        flattened: Whether the file keeps the matrix as a convolution of one pixel.
    """

    name: str
    third: int | None = None
    transposed: bool = False
    flattened: bool = False

    def take(self, tensor: Tensor) -> Tensor:
        """Give the parameter's values as a view of the stored tensor."""
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        if self.transposed:
            tensor = tensor.T
        return tensor.flatten(1) if self.flattened and tensor.ndim == 4 else tensor


def clip_origin(path: str, key: str, stored: Container[str]) -> Origin:
    """Give the place of a text encoder's parameter in a file that names it after transformers.

    Args:
        path: Of the parameter in transformers' module.
        key: What stands before the encoder's names in the file.
        stored: Names of the file's tensors; those of old lack a word.
    """
    name = names.clip_path(path)
    short = name.removeprefix("text_model.")
    return Origin(name=key + (short if key + short in stored else name))


def openclip_origin(path: str, key: str) -> Origin:
    """Give the place of a text encoder's parameter in a file that names it after OpenCLIP."""
    match = re.search(r"\.([qkv])_proj\.", path)
    return Origin(
        name=key + names.clip_to_openclip(path),
        third="qkv".index(match[1]) if match else None,
        transposed=path.startswith("text_projection"),
    )
