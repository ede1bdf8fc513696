"""What brings a state here from the Hugging Face hub."""

from __future__ import annotations

import glob
import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Self

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from sdxl_train import UserError
from sdxl_train.ldm import is_offline, keep_pipes_free_of_bars

if TYPE_CHECKING:
    from collections.abc import Sequence

_log = logging.getLogger(__name__)

_FORM = "OWNER/NAME/FOLDER, or OWNER/NAME/FOLDER:REVISION:TYPE with TYPE model, dataset or space"
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class StateAddress:
    """Where on the hub a state lies.

    Attributes:
        repo: ``owner/name``.
        folder: Path of the state in it; empty for its top.
        revision: Branch, tag or commit; None for the main branch.
        kind: ``model``, ``dataset`` or ``space``.
    """

    repo: str
    folder: str
    revision: str | None
    kind: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``owner/name/folder[:revision[:type]]``, as sd-scripts does.

        Raises:
            ValueError: If it is not of that form.
        """
        path, *rest = text.split(":")
        parts = PurePosixPath(path).parts
        revision, kind = (*rest, "", "")[:2]
        kind = kind or "model"
        if len(rest) > 2 or len(parts) < 2 or ".." in parts or kind not in constants.REPO_TYPES:
            raise ValueError(f"{text!r} is no address of a state on the hub")
        repo = "/".join(parts[:2])
        validate_repo_id(repo)
        return cls(repo=repo, folder="/".join(parts[2:]), revision=revision or None, kind=kind)

    def within(self, name: str) -> str:
        """Give the path in the repository of a file of the state."""
        return f"{self.folder}/{name}" if self.folder else name


def fetch(text: str, files: Sequence[str], *, place: str, token: str | None) -> Path:
    """Download files of a state and give their folder, in the local cache of the hub.

    What is in that cache already is not downloaded again. It also serves without a network, if it
    is complete.

    Args:
        text: The address of the state.
        files: Names of the files, its manifest first.
        place: Where the user named it.
        token: Token of the user; None for that of the environment.

    Raises:
        UserError: If the hub cannot be reached, refuses, or has no such state.
    """
    try:
        address = StateAddress.parse(text)
    except (ValueError, HFValidationError) as error:
        raise UserError.of(place, str(error), f"write {_FORM}") from None
    keep_pipes_free_of_bars()
    api = HfApi(token=token)
    # As patterns: with brackets of their own, names would not stand for themselves.
    wanted = [glob.escape(address.within(name)) for name in files]
    try:
        snapshot = Path(
            api.snapshot_download(
                address.repo,
                repo_type=address.kind,
                revision=address.revision,
                allow_patterns=wanted,
            )
        )
        folder = snapshot / address.folder
        missing = next((name for name in files if not (folder / name).is_file()), None)
        if missing is None:
            _log.info("resume from %s, commit %s", address.repo, snapshot.name)
            return folder
        there = api.list_repo_files(address.repo, repo_type=address.kind, revision=address.revision)
    except (OSError, HTTPError) as error:
        raise UserError.of(place, f"{text}: {_reason(error)}", _remedy(error)) from error
    found = [name.rpartition("/")[0] for name in there if name.endswith(f"/{files[0]}")]
    raise UserError.of(
        place,
        f"{address.repo} has no {address.within(missing)}",
        f"states there: {', '.join(found[-_MOST_NAMED:])}" if found else f"write {_FORM}",
    )


def _reason(error: Exception) -> str:
    """Word why the hub gave nothing: without addresses and numbers of requests."""
    if isinstance(error, GatedRepoError):
        return "the hub gives this repository only to those who accepted its terms"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such repository, or it is private and the token does not open it"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)) and is_offline():
        return "HF_HUB_OFFLINE forbids downloads, and the local cache does not have it"
    return str(error).partition("\n")[0] or type(error).__name__


def _remedy(error: Exception) -> str:
    if isinstance(error, RepositoryNotFoundError):
        return "check the name; give a token by HF_TOKEN or `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"write {_FORM}"
    return "try again, or download the state and name its folder"
