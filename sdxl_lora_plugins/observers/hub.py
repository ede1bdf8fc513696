"""Uploads to the Hugging Face hub, and states from there. Light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import SecretStr  # noqa: TC002 - pydantic reads the annotations

from sdxl_train import Field, Observer, Problem
from sdxl_train.ldm import is_offline

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sdxl_train import Run, RunConfig


class HubUpload(Observer):
    """Upload each saved network to a repository of the Hugging Face hub; resume from there.

    An upload that fails is a warning; the run and later uploads go on.
    """

    unlimited: ClassVar[bool] = True

    huggingface_repo_id: str | None = Field(
        None, description="Repository to upload to: OWNER/NAME. It is made if it is not there."
    )
    huggingface_repo_type: Literal["model", "dataset", "space"] = Field(
        "model", description="Its type."
    )
    huggingface_path_in_repo: str | None = Field(
        None, description="Folder in it. Default: its top."
    )
    huggingface_repo_visibility: Literal["public", "private"] = Field(
        "private", description="Who may see it, if it is made."
    )
    huggingface_token: SecretStr | None = Field(
        None, description="Token. Better: HF_TOKEN, or `hf auth login`."
    )
    save_state_to_huggingface: bool = Field(False, description="Upload states too.")
    resume_from_huggingface: bool = Field(
        False, description="--resume names a state on the hub: OWNER/NAME/FOLDER[:REVISION[:TYPE]]."
    )
    async_upload: bool = Field(
        False, description="Go on training meanwhile; at its end, the run waits for uploads."
    )

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Yield why nothing could be uploaded, or resumed from."""
        if self.resume_from_huggingface and config.training.resume is None:
            yield Problem(
                place=config.place("resume_from_huggingface"),
                message="does nothing without --resume",
                remedy="name the state, --resume OWNER/NAME/FOLDER, or leave it out",
            )
        if self.huggingface_repo_id is not None:
            yield from self._upload_problems(config)
            return
        downloads = {"resume_from_huggingface"}
        if self.resume_from_huggingface:
            downloads.add("huggingface_token")
        if idle := sorted(self.model_fields_set - downloads):
            yield Problem(
                place=", ".join(config.place(name) for name in idle),
                message="does nothing without --huggingface_repo_id",
                remedy="name the repository, or leave it out",
            )

    def _upload_problems(self, config: RunConfig) -> Iterator[Problem]:
        place = config.place("huggingface_repo_id")
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.huggingface_repo_id or "")
        except HFValidationError as error:
            yield Problem(
                place=place,
                message=f"{self.huggingface_repo_id!r} is no name of a repository: {error}",
                remedy="write OWNER/NAME",
            )
        if is_offline():
            yield Problem(
                place=place,
                message="HF_HUB_OFFLINE forbids to upload",
                remedy="unset it, or leave --huggingface_repo_id out",
            )

    def fetch_state(self, config: RunConfig, files: Sequence[str]) -> Path | None:
        """Download the state that ``--resume`` names."""
        if not self.resume_from_huggingface or config.training.resume is None:
            return None
        from sdxl_lora_plugins.observers.fetching import fetch

        token = self.huggingface_token
        return fetch(
            config.training.resume,
            files,
            place=config.place("resume"),
            token=token.get_secret_value() if token else None,
        )

    def build(self, run: Run) -> object:
        """Begin to watch for files."""
        from sdxl_lora_plugins.observers.uploading import Uploader

        return Uploader(self, run)
