"""Uploads to the Hugging Face hub. Light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import SecretStr  # noqa: TC002 - pydantic reads the annotations

from sdxl_train import Field, Observer, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train import Run, RunConfig


class HubUpload(Observer):
    """Upload each saved network to a repository of the Hugging Face hub.

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
    async_upload: bool = Field(
        False, description="Go on training meanwhile; at its end, the run waits for uploads."
    )

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Yield why nothing could be uploaded."""
        place = config.place("huggingface_repo_id")
        if self.huggingface_repo_id is None:
            names = sorted(self.model_fields_set)
            yield Problem(
                place=", ".join(config.place(name) for name in names) or place,
                message="does nothing without --huggingface_repo_id",
                remedy="name the repository, or leave it out",
            )
            return
        from huggingface_hub import constants
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.huggingface_repo_id)
        except HFValidationError as error:
            yield Problem(
                place=place,
                message=f"{self.huggingface_repo_id!r} is no name of a repository: {error}",
                remedy="write OWNER/NAME",
            )
        if constants.HF_HUB_OFFLINE:
            yield Problem(
                place=place,
                message="HF_HUB_OFFLINE forbids to upload",
                remedy="unset it, or leave --huggingface_repo_id out",
            )

    def build(self, run: Run) -> object:
        """Begin to watch for files."""
        from sdxl_lora_plugins.observers.uploading import Uploader

        return Uploader(self, run)
