"""Parts of a model whose weights are read when something needs them, and not before.

A run whose encodings are all cached needs neither the VAE nor the text encoders.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdxl_train.data.file_facts import stamp_of
from sdxl_train.data.scan_index import is_settled, user_cache
from sdxl_train.errors import UserError
from sdxl_train.files import replace_file
from sdxl_train.ldm.hashes import text_hash
from sdxl_train.rng import global_generators_kept

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from sdxl_train.data.file_facts import Stamp

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Gives a module, so far of shapes only, its weights.

    Attributes:
        files: Where they are.
        dtype: What they become.
        read: Reads them into the module.
        stamps: The state of the files when the module was made.
        stored: How the weights are kept, if not as they were read.
    """

    files: tuple[Path, ...]
    dtype: torch.dtype
    read: Callable[[], None]
    stamps: tuple[Stamp, ...]
    stored: str = ""

    def then(self, act: Callable[[], None], stored: str = "") -> Reader:
        """Do something with the weights, once they are read."""

        def read() -> None:
            self.read()
            act()

        return replace(self, read=read, stored=self.stored + stored)

    def __call__(self) -> None:
        """Read the weights.

        Raises:
            UserError: If the files are no longer those of the start, which may have been told
                already by their hashes.
        """
        # Libraries draw what they then overwrite; when that happens must change nothing.
        with global_generators_kept():
            self.read()
        for file, before, now in zip(self.files, self.stamps, stamps_of(self.files), strict=True):
            if before != now:
                raise UserError.of(
                    str(file), "was changed while the run began to use it", "start the run again"
                )


def stamps_of(files: Sequence[Path]) -> tuple[Stamp, ...]:
    """Give the state of files; one that is changed has another."""
    return tuple(stamp_of(file.stat()) for file in files)


def remembered(files: Sequence[Path], what: Sequence[str], compute: Callable[[], str]) -> str:
    """Give what follows from the content of files, computed once for each state of them.

    It is kept in the user's cache folder, which can be deleted at any time.

    Args:
        files: The files, of which at least one.
        what: All else that it depends on.
        compute: Computes it.
    """
    places = [str(file.resolve()) for file in files]
    stamps = stamps_of(files)
    home = user_cache() / "weights"
    path = home / f"{text_hash([*places, *what])}.json"
    try:
        known = json.loads(path.read_bytes())
        if known["stamps"] == [list(stamp) for stamp in stamps]:
            return str(known["value"])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # there is none, or it is damaged: it is computed again
    value = compute()
    if all(map(is_settled, stamps)) and stamps == stamps_of(files):
        document = json.dumps({"stamps": stamps, "value": value})
        try:
            home.mkdir(parents=True, exist_ok=True)
            replace_file(path, document.encode(), durable=False)
        except OSError as error:
            # It costs the next start some seconds, which is no reason to stop this one.
            logger.info("%s cannot be written: %s", path, error.strerror)
    return value
