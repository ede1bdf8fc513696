"""The options of the command line that say what to train on, under the names of sd-scripts."""

from __future__ import annotations

import math
from pathlib import Path  # noqa: TC003 - pydantic needs it
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from sdxl_train.components import OptionModel

DEFAULT = "default"
"""The origin of a value that nobody set."""


def parse_resolution(value: object) -> object:
    """Read ``1024``, ``"1024"``, ``"1024,768"`` or ``[1024, 768]`` as (width, height).

    Raises:
        ValueError: For anything else.
    """
    if value is None:
        return None
    items: list[object] = list(value) if isinstance(value, (list, tuple)) else [value]
    parts = [part for item in items for part in str(item).split(",")]
    if any(isinstance(item, (bool, float)) for item in items):
        parts = []
    numbers = [int(part) for part in parts if part.strip().isdecimal()]
    if len(numbers) != len(parts) or len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError(f"{value!r} is not a resolution: write 1024 or 1024,768 (width, height)")
    return (numbers[0], numbers[-1])


def _with_dot(extension: str) -> str:
    return extension if extension.startswith(".") else f".{extension}"


_Side: TypeAlias = Annotated[int, Field(ge=1)]
Resolution: TypeAlias = Annotated[
    tuple[int, int],
    BeforeValidator(
        parse_resolution,
        json_schema_input_type=_Side
        | Annotated[list[_Side], Field(min_length=1, max_length=2)]
        | Annotated[str, Field(pattern=r"^ *[0-9]+ *(, *[0-9]+ *)?$")],
    ),
]
"""(width, height), written as one side, ``W,H`` or a list."""
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
"""A probability."""
Count: TypeAlias = Annotated[int, Field(ge=0)]
Positive: TypeAlias = Annotated[int, Field(ge=1)]
Separator: TypeAlias = Annotated[str, Field(min_length=1)]
Extension: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_with_dot)]
"""A file name's ending; the dot is added where it is missing."""


def parse_range(value: object) -> object:
    """Read ``"2.0,4.0"`` or ``[2.0, 4.0]`` as (lowest, highest).

    Raises:
        ValueError: For anything else, and where the highest is below the lowest.
    """
    if value is None:
        return None
    items = list(value) if isinstance(value, (list, tuple)) else str(value).split(",")
    try:
        numbers = [float(str(item)) for item in items if not isinstance(item, bool)]
    except ValueError:
        numbers = []
    if len(numbers) != 2 or not 0 < numbers[0] <= numbers[1] < math.inf:
        raise ValueError(f"{value!r} is not a range: write 2.0,4.0 (lowest, highest), above 0")
    return (numbers[0], numbers[1])


Range: TypeAlias = Annotated[
    tuple[float, float],
    BeforeValidator(
        parse_range,
        json_schema_input_type=Annotated[list[float], Field(min_length=2, max_length=2)]
        | Annotated[str, Field(pattern=",")],
    ),
]
"""(lowest, highest), both above 0, written as ``LO,HI`` or a list."""
Interpolation: TypeAlias = Literal[
    "lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"
]
"""How pixels are computed where an image is resized."""


class DatasetOptions(OptionModel):
    """What to train on, and how its images and captions are prepared."""

    train_data_dir: Path | None = Field(
        None,
        description="Folder of N_name folders: the images in each repeat N times an epoch. "
        "A folder of images without such folders is taken as it is.",
    )
    reg_data_dir: Path | None = Field(
        None, description="The same for regularization images, which hold the class in place."
    )
    dataset_config: Path | None = Field(
        None,
        description="TOML or JSON file of datasets and subsets, instead of train_data_dir. "
        "Relative folders in it are looked for from the current folder, then from the file's.",
    )
    in_json: Path | None = Field(
        None,
        description="Metadata file (.json or .jsonl) with the captions and tags of the images in "
        "train_data_dir, instead of N_name folders.",
    )
    resolution: Resolution | None = Field(
        None, description="Training size in pixels: one side, or width,height (1024 or 1024,768)."
    )
    train_batch_size: Positive = Field(1, description="Images in a batch, on each device.")
    enable_bucket: bool = Field(
        False,
        description="Train each image at the size, of about the resolution's area, that is nearest "
        "to its aspect ratio. Off: every image is resized and centre-cropped to the resolution.",
    )
    min_bucket_reso: Positive = Field(256, description="Shortest side of a bucket.")
    max_bucket_reso: Positive = Field(
        1024, description="Longest side of a bucket. At a resolution of 1024, 2048 suits."
    )
    bucket_reso_steps: Positive = Field(64, description="Sides of buckets are multiples of this.")
    bucket_no_upscale: bool = Field(
        False, description="Never enlarge an image: its bucket is made to measure."
    )
    caption_extension: Extension = Field(
        ".caption",
        description="Ending of caption files, beside the images. Unset: .caption, else .txt.",
    )
    caption_extention: Extension | None = Field(
        None, description="The same as caption_extension, as it was once spelled."
    )
    shuffle_caption: bool = Field(False, description="Shuffle the tags of a caption each time.")
    caption_separator: Separator = Field(",", description="What stands between the tags.")
    keep_tokens: Count = Field(
        0, description="Number of leading tags that are neither shuffled nor dropped."
    )
    keep_tokens_separator: str = Field(
        "",
        description="Mark after which the tags may be shuffled or dropped, until it occurs again. "
        "It is taken out of the caption.",
    )
    secondary_separator: Separator | None = Field(
        None,
        description="What stands between tags that stay together; in the end it becomes the "
        "caption_separator.",
    )
    enable_wildcard: bool = Field(
        False,
        description="Each time, draw one line of a caption file with several, and one alternative "
        "of {red|blue}. {{ and }} stand for braces.",
    )
    caption_prefix: str | None = Field(None, description="Text put before each caption.")
    caption_suffix: str | None = Field(None, description="Text put after each caption.")
    caption_dropout_rate: Share = Field(
        0.0, description="Probability that a sample is trained with an empty caption."
    )
    caption_dropout_every_n_epochs: Count = Field(
        0, description="Train every Nth epoch with empty captions. 0: never."
    )
    caption_tag_dropout_rate: Share = Field(0.0, description="Probability that a tag is dropped.")
    token_warmup_step: Annotated[float, Field(ge=0)] = Field(
        0,
        description="Steps, or a share of all below 1, until every tag of a caption is trained; at "
        "first only the leading ones are.",
    )
    token_warmup_min: Count = Field(
        1, description="Tags, behind the kept ones, with which that warm-up begins."
    )
    flip_aug: bool = Field(False, description="Mirror half of the samples from left to right.")
    color_aug: bool = Field(
        False,
        description="Shift the hue, or change the gamma, of a third of the samples a little.",
    )
    random_crop: bool = Field(
        False,
        description="Cut the overhang off at a random place instead of evenly. Without "
        "enable_bucket the image is not even shrunk before.",
    )
    face_crop_aug_range: Range | None = Field(
        None,
        description="Crop around the face that a file name ending in _X_Y_W_H tells, with a side "
        "of LO to HI times the face. Without enable_bucket only.",
    )
    resize_interpolation: Interpolation | None = Field(
        None,
        description="How images are resized. Unset: by area to shrink, lanczos to enlarge.",
    )
    alpha_mask: bool = Field(
        False, description="Weigh the loss of each pixel by the image's own alpha channel."
    )
    masked_loss: bool = Field(
        False, description="Weigh the loss of each pixel by the masks in conditioning_data_dir."
    )
    conditioning_data_dir: Path | None = Field(
        None,
        description="Folder of masks named like the images, white where the loss counts; of an "
        "N_name folder, the masks may lie in a folder of that name inside it.",
    )
    masked_loss_normalize: bool = Field(
        False,
        description="Divide a masked loss by the masked share of the image, so that a small mask "
        "counts as much as a large one.",
    )
    dataset_repeats: Count = Field(
        1, description="Repeats an epoch of images whose folder or subset does not say its own."
    )
    debug_dataset: bool = Field(
        False,
        description="Do not train: write samples as they would be trained, with crops, masks and "
        "captions, as pictures and a page into the output folder.",
    )
    cache_info: bool = Field(
        False, description="For sd-scripts' users; sizes and captions are always kept."
    )
    validation_split: Share = Field(
        0.0,
        description="Share of the images that is held out of training, to validate on. The same "
        "file names are held out each time; regularization images never are.",
    )
    validation_seed: Count | None = Field(
        None, description="Seed of what is held out, and of the noise to validate with. Default: 0."
    )
    prior_loss_weight: float = Field(
        1.0, ge=0, description="Weight of the loss of regularization images."
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error",
        description="An image that is damaged, too small or no image at all stops the run before "
        "it starts, or is left out with a warning.",
    )
    strict_captions: bool = Field(
        False,
        description="An image without a caption, and a caption that is empty or not UTF-8, stops "
        "the run before it starts.",
    )
    cache_latents: bool = Field(
        False, description="Encode the images once, before training, and keep the latents."
    )
    cache_latents_to_disk: bool = Field(
        False,
        description="Keep the latents beside the images, for later runs. Implies cache_latents.",
    )
    vae_batch_size: Positive = Field(1, description="Images encoded at a time.")
    cache_text_encoder_outputs: bool = Field(
        False, description="Encode the captions once, before training; the encoders do not train."
    )
    cache_text_encoder_outputs_to_disk: bool = Field(
        False,
        description="Keep what the encoders give beside the images, for later runs. Implies "
        "cache_text_encoder_outputs.",
    )
    text_encoder_batch_size: Positive = Field(
        1, description="Captions encoded at a time while no text encoder trains."
    )
    skip_cache_check: bool = Field(
        False,
        description="Do not read the files of caches at the start; a damaged one then stops the "
        "run when it is needed.",
    )
    max_data_loader_n_workers: Count = Field(
        8,
        description="Processes that load images, at most one for each CPU core. "
        "0: load in the main process.",
    )
    persistent_data_loader_workers: bool = Field(
        False, description="Keep these processes from epoch to epoch."
    )

    @property
    def caches_latents(self) -> bool:
        """Whether latents are kept, in memory or on disk."""
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def caches_text(self) -> bool:
        """Whether the text encoders' outputs are kept, in memory or on disk."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk
