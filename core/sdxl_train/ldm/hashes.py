"""Hashes of weight files, as image UIs show and look them up, and of weights in memory."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn


def short_hash(path: Path) -> str:
    """Give the first 8 hex digits of the SHA-256 of 64 KiB at 1 MiB (the UIs' first scheme)."""
    with path.open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def full_hash(path: Path) -> str:
    """Give the SHA-256 of a whole file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(texts: Sequence[str]) -> str:
    """Give a hash of texts."""
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=16).hexdigest()


def weights_hash(modules: Sequence[nn.Module], settings: Sequence[str]) -> str:
    """Give a hash of modules as they are in memory: weights and their precision.

    Args:
        modules: Hold the weights.
        settings: What else counts.
    """
    digest = hashlib.blake2b(digest_size=16)
    for setting in settings:
        digest.update(f"{setting}\n".encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
