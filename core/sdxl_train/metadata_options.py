"""What the user says of the network, for the header of its files."""

from __future__ import annotations

import base64
from pathlib import Path  # noqa: TC003 - pydantic needs it
from typing import TYPE_CHECKING

from pydantic import Field

from sdxl_train.components import OptionModel
from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.config import RunConfig

_PREFIX = "metadata_"
_IMAGES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
"""What files of images begin with, and their media types."""
_MAX_THUMBNAIL_BYTES = 1_000_000


class MetadataOptions(OptionModel):
    """What the metadata of the saved files says."""

    no_metadata: bool = Field(
        False, description="Save only the metadata that clients need to load the file."
    )
    training_comment: str | None = Field(None, description="Free text for the metadata.")
    metadata_title: str | None = Field(
        None, description="Title of the network. Default: the output name."
    )
    metadata_author: str | None = Field(None, description="Its author.")
    metadata_description: str | None = Field(None, description="What it is.")
    metadata_license: str | None = Field(None, description="Its licence.")
    metadata_tags: str | None = Field(None, description="Its tags, separated by commas.")
    metadata_usage_hint: str | None = Field(None, description="How to use it.")
    metadata_trigger_phrase: str | None = Field(None, description="What a prompt should say.")
    metadata_merged_from: str | None = Field(None, description="What it was merged from.")
    metadata_preprocessor: str | None = Field(None, description="What prepares its inputs.")
    metadata_is_negative_embedding: str | None = Field(
        None, description="Whether it is for negative prompts."
    )
    metadata_thumbnail: Path | None = Field(
        None, description="Small picture of it: a PNG, JPEG or WebP file, put into the header."
    )

    def given(self) -> list[str]:
        """Name the options that have a value."""
        return [name for name, value in self if value not in (None, False)]

    def modelspec(self) -> dict[str, str]:
        """Give the entries of the Stability model specification that the user asks for."""
        entries = {
            f"modelspec.{name.removeprefix(_PREFIX)}": str(value)
            for name, value in self
            if name.startswith(_PREFIX) and value is not None
        }
        if self.metadata_thumbnail is not None:
            entries["modelspec.thumbnail"] = _data_url(self.metadata_thumbnail)
        return entries

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Yield why the picture cannot be put into the header."""
        path = self.metadata_thumbnail
        if path is None:
            return
        message = None
        try:
            data = path.read_bytes()
        except OSError as error:
            message = f"{path} cannot be read: {error.strerror}"
        else:
            if _media_type(data) is None:
                message = f"{path} is no PNG, JPEG or WebP image"
            elif len(data) > _MAX_THUMBNAIL_BYTES:
                message = f"{path} has {len(data):,} bytes, more than {_MAX_THUMBNAIL_BYTES:,}"
        if message:
            yield Problem(place=config.place("metadata_thumbnail"), message=message)


def _media_type(data: bytes) -> str | None:
    return next((kind for start, kind in _IMAGES.items() if data.startswith(start)), None)


def _data_url(path: Path) -> str:
    data = path.read_bytes()
    return f"data:{_media_type(data)};base64,{base64.b64encode(data).decode()}"
