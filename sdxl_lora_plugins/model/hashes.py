"""Hashes of weight files, as image UIs show and look them up."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def short_hash(path: Path) -> str:
    """Give the first 8 hex digits of the SHA-256 of 64 KiB at 1 MiB (the UIs' first scheme)."""
    with path.open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def full_hash(path: Path) -> str:
    """Give the SHA-256 of a whole file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
