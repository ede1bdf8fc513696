"""Models named by a hub id: found in the local cache, downloaded only when a run is built."""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WEIGHT_STEMS = ("model", "diffusion_pytorch_model")
"""How transformers and diffusers name the weights of a part."""
_VARIANTS = (("{}.safetensors", "{}-?????-of-?????.safetensors"), ("{}.fp16*.safetensors",))
_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def looks_like_id(name: str) -> bool:
    """Tell whether a name that is no path can be a hub id: ``owner/name``."""
    if not _ID.fullmatch(name) or name.endswith(_FILE_SUFFIXES):
        return False
    # `models/base` beside an existing folder `models` is a misspelt path.
    return not Path(name).parent.is_dir()


def is_offline() -> bool:
    """Tell whether the environment forbids hub access (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def keep_pipes_free_of_bars() -> None:
    """Have the hub's library draw its progress bars on a terminal only."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()


def cached_snapshot(repo: str) -> Path | None:
    """Give the folder of a repository in the local cache, if there is one. Asks no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def download(repo: str, *, subfolders: Collection[str], weights: bool) -> Path:
    """Download the files of a model that training reads and give their folder.

    Args:
        repo: The hub id.
        subfolders: The parts to take; ``""`` is the top folder.
        weights: Whether the weights are wanted, or configurations and tokenizers only.

    Raises:
        UserError: If the hub cannot be reached or does not know the id.
    """
    from huggingface_hub import list_repo_files, snapshot_download

    keep_pipes_free_of_bars()
    small = [f"{folder}/*" if folder else "*" for folder in subfolders]
    patterns = [f"{start}{suffix}" for start in small for suffix in (".json", ".txt")]
    try:
        # The first call turns every trouble with the network into an OSError.
        folder = Path(snapshot_download(repo, allow_patterns=patterns))
        if weights:
            wanted = _weight_files(list_repo_files(repo), subfolders)
            folder = Path(snapshot_download(repo, allow_patterns=wanted))
    except OSError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError.of(
            repo,
            f"there is no such file or folder, and the hub gave no model of this id: {reason}",
            "check the name, or download the model and name its folder",
        ) from error
    return folder


def _weight_files(files: Iterable[str], subfolders: Collection[str]) -> list[str]:
    """Choose the weights of each part: plain safetensors files, or fp16 where they are all."""
    chosen: list[str] = []
    for folder in subfolders:
        names = [Path(file).name for file in files if file.rpartition("/")[0] == folder]
        for forms in _VARIANTS:
            patterns = [form.format(stem) for form in forms for stem in WEIGHT_STEMS]
            found = [name for name in names if any(fnmatch(name, p) for p in patterns)]
            if found:
                chosen += [f"{folder}/{name}" if folder else name for name in found]
                break
    return chosen
