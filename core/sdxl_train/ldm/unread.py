"""Parts of a model whose weights are read when something needs them, and not before.

A run whose encodings are all cached needs neither the VAE nor the text encoders.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from sdxl_train._version import __version__
from sdxl_train.data.file_facts import stamp_of
from sdxl_train.data.scan_index import is_settled, user_cache
from sdxl_train.errors import UserError
from sdxl_train.files import replace_file
from sdxl_train.heap import give_back_holes
from sdxl_train.ldm.hashes import text_hash, weights_hash
from sdxl_train.quantized import formats_of
from sdxl_train.rng import global_generators_kept

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from sdxl_train.data.file_facts import Stamp

logger = logging.getLogger(__name__)

_UNKNOWN: Final = "unknown"
"""Hash of weights that were never read, by which no encoding can have been made."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Gives a module, so far of shapes only, its weights.

    Attributes:
        files: Where they are.
        read: Reads them into the module, which stores them as it is set up to; None for a plan,
            whose modules stay without.
        stamps: The state of the files when the module was made.
    """

    files: tuple[Path, ...]
    read: Callable[[], None] | None
    stamps: tuple[Stamp, ...]

    def __call__(self) -> None:
        """Read the weights.

        Raises:
            UserError: If the files are no longer those of the start, which may have been told
                already by their hashes.
        """
        if self.read is None:
            return
        # Libraries draw what they then overwrite; when that happens must change nothing.
        with global_generators_kept():
            self.read()
        # Weights that were converted or packed were there in another form for a moment.
        give_back_holes()
        for file, before, now in zip(self.files, self.stamps, stamps_of(self.files), strict=True):
            if before != now:
                raise UserError.of(
                    str(file), "was changed while the run began to use it", "start the run again"
                )


class UnreadParts:
    """Those parts of a model that want their weights still, and how each gets them.

    Args:
        readers: By module; a module that is not among them has its weights.
    """

    def __init__(self, readers: Mapping[nn.Module, Reader]) -> None:
        self._readers = dict(readers)
        self._unread = set(readers)

    def read(self, module: nn.Module) -> None:
        """Give a module its weights, unless it has them.

        Raises:
            UserError: If a file was changed since the start, lacks tensors or holds NaN.
        """
        if module in self._unread:
            self._unread.remove(module)
            self._readers[module]()

    def read_to_change(self, module: nn.Module) -> None:
        """Read a module whose weights will be others than those of its files."""
        self.read(module)
        self._readers.pop(module, None)

    def forget(self, modules: Sequence[nn.Module]) -> bool:
        """Forget how modules are read; tell whether any of them was."""
        were_read = any(module not in self._unread for module in modules)
        for module in modules:
            self._unread.discard(module)
            self._readers.pop(module, None)
        return were_read

    def hash(self, modules: Sequence[nn.Module], settings: Sequence[str]) -> str:
        """Hash modules as they are in memory, or as they would be: see :func:`weights_hash`.

        A plan takes what an earlier start found out.
        """
        readers = [self._readers[module] for module in modules if module in self._readers]

        def compute() -> str:
            for module in modules:
                self.read(module)
            return weights_hash(modules, settings)

        if len(readers) < len(modules):
            is_plan = any(p.is_meta for module in modules for p in module.parameters())
            return _UNKNOWN if is_plan else compute()
        versions = [f"{name} {version(name)}" for name in ("diffusers", "transformers")]
        forms = [_form(module) for module in modules]
        files = [file for reader in readers for file in reader.files]
        of = ["weights", __version__, *versions, *forms, *settings]
        if any(reader.read is None for reader in readers):
            return recalled(files, of) or _UNKNOWN
        return remembered(files, of, compute)


def _form(module: nn.Module) -> str:
    """Say how a module stores its weights, whether it has them or not."""
    dtypes = sorted({str(parameter.dtype) for parameter in module.parameters()})
    return " ".join([*dtypes, formats_of(module)])


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
    stamps = stamps_of(files)
    if (known := recalled(files, what)) is not None:
        return known
    value = compute()
    if all(map(is_settled, stamps)) and stamps == stamps_of(files):
        document = json.dumps({"stamps": stamps, "value": value})
        path = _place(files, what)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, document.encode(), durable=False)
        except OSError as error:
            # It costs the next start some seconds, which is no reason to stop this one.
            logger.info("%s cannot be written: %s", path, error.strerror)
    return value


def recalled(files: Sequence[Path], what: Sequence[str]) -> str | None:
    """Give what was computed before of files in this state; None if it was not."""
    try:
        known = json.loads(_place(files, what).read_bytes())
        if known["stamps"] == [list(stamp) for stamp in stamps_of(files)]:
            return str(known["value"])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # there is none, or it is damaged: it is computed again
    return None


def _place(files: Sequence[Path], what: Sequence[str]) -> Path:
    places = [str(file.resolve()) for file in files]
    return user_cache() / "weights" / f"{text_hash([*places, *what])}.json"
