"""What a scan knows of the images to train on. No torch, no Pillow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    from sdxl_train.data.buckets import Fit, Size
    from sdxl_train.data.dataset_config import DatasetConfig, SubsetConfig


class ImageRecord(NamedTuple):
    """An image to train on. There may be 100 000: a dataclass takes thrice as long to make.

    Attributes:
        folder: The folder of the file.
        name: The name of the file in it.
        num_bytes: Length of the file.
        size: Its (width, height), upright.
        caption: Its caption as read, or the class tokens, or empty; with wildcards, all lines.
        has_caption: Whether it has a caption file.
        repeats: Times that it is trained in an epoch.
        is_reg: Whether it is a regularization image.
        subset: Index of its subset in the dataset's configuration.
        fit: How it gets its training size.
        mask: The file of its mask.
    """

    folder: Path
    name: str
    num_bytes: int
    size: Size
    caption: str
    has_caption: bool
    repeats: int
    is_reg: bool
    subset: int
    fit: Fit
    mask: Path | None = None

    @property
    def path(self) -> Path:
        """The file. Paths are made when asked for: 100 000 take half a second."""
        return self.folder / self.name

    @property
    def key(self) -> str:
        """A short name for messages: folder and file."""
        return f"{self.folder.name}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset and its images, in the order of its subsets and of the file names."""

    config: DatasetConfig
    images: tuple[ImageRecord, ...]

    def subset_of(self, image: ImageRecord) -> SubsetConfig:
        """Give the configuration of an image's subset."""
        return self.config.subsets[image.subset]
