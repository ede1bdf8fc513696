"""What uploads: one file after the other, in a thread of its own."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from huggingface_hub import HfApi

from sdxl_train.ldm import keep_pipes_free_of_bars

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    from sdxl_lora_plugins.observers.hub import HubUpload
    from sdxl_train import Checkpoint, Run

_log = logging.getLogger(__name__)


class Uploader:
    """Uploads what a run saves, if it may; methods are named after events."""

    def __init__(self, options: HubUpload, run: Run) -> None:
        self._options = options
        self._folder = run.output_dir
        self._stem = run.name
        keep_pipes_free_of_bars()
        token = options.huggingface_token
        self._api = HfApi(token=token.get_secret_value() if token else None)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub-upload")
        self._is_made = False
        # What lay there before is of another run, or was uploaded by the run that this one resumes.
        self._known = set(self._states())

    def checkpoint_saved(self, checkpoint: Checkpoint) -> None:
        """Upload a network, and the states since the last one."""
        self._submit([checkpoint.path, *self._new_states()])

    def run_finished(self) -> None:
        """Upload the last states, and wait for all."""
        self._submit(self._new_states())
        self._pool.shutdown(wait=True)

    def _states(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._stem}*-state"))

    def _new_states(self) -> list[Path]:
        if not self._options.save_state_to_huggingface:
            return []
        found = [path for path in self._states() if path not in self._known]
        self._known.update(found)
        return found

    def _submit(self, paths: list[Path]) -> None:
        # Without a repository, the hub only gave the state that this run went on from.
        for path in paths if self._options.huggingface_repo_id else ():
            future = self._pool.submit(self._upload, path)
            future.add_done_callback(partial(_tell, path.name))
            if not self._options.async_upload:
                future.exception()

    def _upload(self, path: Path) -> None:
        options = self._options
        repo, kind = options.huggingface_repo_id, options.huggingface_repo_type
        assert repo is not None  # as nothing is submitted then
        if not self._is_made:
            private = options.huggingface_repo_visibility == "private"
            self._api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
            self._is_made = True
        prefix = (options.huggingface_path_in_repo or "").strip("/")
        target = f"{prefix}/{path.name}" if prefix else path.name
        if path.is_dir():
            self._api.upload_folder(
                repo_id=repo, folder_path=path, path_in_repo=target, repo_type=kind
            )
        else:
            self._api.upload_file(
                path_or_fileobj=path, path_in_repo=target, repo_id=repo, repo_type=kind
            )


def _tell(name: str, done: Future[None]) -> None:
    """Log how an upload ended. Whatever went wrong, training goes on."""
    error = done.exception()
    if error is None:
        _log.info("uploaded %s", name)
    else:
        reason = str(error).partition("\n")[0] or type(error).__name__
        _log.warning("%s was not uploaded: %s", name, reason)
