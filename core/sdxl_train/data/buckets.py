"""Aspect-ratio buckets: which training size an image gets, and how it is resized and cropped to it.

The rules and numbers are those of sd-scripts. Sizes are (width, height) in pixels. An image is
resized to cover its bucket, keeping its aspect ratio, and the overhang is cut off evenly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Size: TypeAlias = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True, kw_only=True)
class BucketOptions:
    """How training sizes are found. The fields carry the names of the options."""

    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How one image gets its training size.

    Attributes:
        bucket: The training size.
        resized: The size to resize to before the crop; covers the bucket.
        crop: (left, top) of the bucket in the resized image.
        aspect_error: Width/height of the bucket minus that of the image.
    """

    bucket: Size
    resized: Size
    crop: tuple[int, int]
    aspect_error: float

    @property
    def crop_share(self) -> float:
        """Share of the resized image's area that is cut off."""
        width, height = self.resized
        return 1 - self.bucket[0] * self.bucket[1] / (width * height)

    def scale(self, size: Size) -> float:
        """Give the factor by which the sides of an image of this size are resized."""
        return self.resized[0] / size[0]

    def is_large_for(self, size: Size) -> bool:
        """Tell whether an image of this size is enlarged to more than twice its size."""
        return self.scale(size) > 2

    def is_extreme_for(self, size: Size) -> bool:
        """Tell whether an image of this size is long and narrow, or loses more than 40 %."""
        return max(size) > 4 * min(size) or self.crop_share > 0.4

    def crop_left(self, *, flipped: bool) -> int:
        """Give the left edge of the crop, in the mirrored image if ``flipped``."""
        left = self.crop[0]
        return self.resized[0] - self.bucket[0] - left if flipped else left


class SizeError(ValueError):
    """An image cannot get any training size; the message says why."""


def rounded_limits(options: BucketOptions) -> tuple[int, int]:
    """Give the smallest and the largest bucket side, rounded outwards to the step."""
    step = options.bucket_reso_steps
    return options.min_bucket_reso // step * step, -(-options.max_bucket_reso // step) * step


def bucket_sizes(resolution: Size, options: BucketOptions) -> tuple[Size, ...]:
    """List the buckets for a training resolution, ascending: areas near to and not above its own.

    The limits must be valid (:func:`check_buckets`).
    """
    step = options.bucket_reso_steps
    low, high = rounded_limits(options)
    area = resolution[0] * resolution[1]
    side = int(math.sqrt(area) // step) * step
    sizes = {(side, side)}
    for width in range(low, high + 1, step):
        height = min(high, area // width // step * step)
        if height >= low:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def fit_to_nearest(size: Size, sizes: Sequence[Size]) -> Fit:
    """Fit an image to the bucket of the nearest aspect ratio, enlarging it where needed."""
    width, height = size
    aspect = width / height
    bucket = (
        size
        if size in sizes
        else min(sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect))
    )
    scale = bucket[1] / height if aspect > bucket[0] / bucket[1] else bucket[0] / width
    return _centred(size, bucket, (_rounded(width * scale), _rounded(height * scale)))


def fit_without_upscaling(size: Size, resolution: Size, step: int) -> Fit:
    """Fit an image to a bucket of its own that is no larger than the image.

    Raises:
        SizeError: If a side is too short for even one step.
    """
    resized = _shrunk(size, resolution, step)
    bucket = (resized[0] // step * step, resized[1] // step * step)
    if min(bucket) == 0:
        raise SizeError(
            f"{size[0]}x{size[1]} is too small: with bucket_no_upscale a side must keep at least "
            f"{step} pixels (bucket_reso_steps)"
        )
    return _centred(size, bucket, resized)


def fit_uncut(size: Size, resolution: Size) -> Fit:
    """Fit an image to the resolution without shrinking it: what is cut out may lie anywhere."""
    if size[0] < resolution[0] or size[1] < resolution[1]:
        return fit_to_nearest(size, (resolution,))
    return _centred(size, resolution, size)


def fitter(
    resolution: Size, options: BucketOptions, *, uncut: bool = False
) -> Callable[[Size], Fit]:
    """Give the function that fits an image size; it raises :class:`SizeError`.

    Args:
        resolution: The training resolution.
        options: The bucket options.
        uncut: Without buckets, do not shrink images: a random crop will cut them, as in sd-scripts.
    """
    if uncut and not options.enable_bucket:
        return cache(lambda size: fit_uncut(size, resolution))
    if options.enable_bucket and options.bucket_no_upscale:
        return cache(
            lambda size: fit_without_upscaling(size, resolution, options.bucket_reso_steps)
        )
    sizes = bucket_sizes(resolution, options) if options.enable_bucket else (resolution,)
    return cache(lambda size: fit_to_nearest(size, sizes))


def check_buckets(
    resolution: Size, options: BucketOptions, *, multiple: int, place: Callable[[str], str]
) -> list[Problem]:
    """Find what is wrong with a resolution and its bucket options.

    Args:
        resolution: The training resolution.
        options: The bucket options.
        multiple: Sides must be a multiple of this many pixels for the model.
        place: Gives the place of an option by its name.
    """
    if not options.enable_bucket:
        return _check_fixed(resolution, multiple, place)
    step = options.bucket_reso_steps
    if step % multiple:
        return [
            Problem(
                place=place("bucket_reso_steps"),
                message=f"{step} is not a multiple of {multiple}, which this model needs",
                remedy=f"use {_nearest_multiple(step, multiple)}",
            )
        ]
    if math.sqrt(resolution[0] * resolution[1]) < step:
        return [
            Problem(
                place=place("resolution"),
                message=f"{_shown(resolution)} is smaller than one step of {step} pixels",
                remedy=f"use at least {step}, or a smaller bucket_reso_steps",
            )
        ]
    return [] if options.bucket_no_upscale else _check_limits(resolution, options, place)


def bucket_warnings(
    resolution: Size,
    options: BucketOptions,
    *,
    is_default: Callable[[str], bool],
    place: Callable[[str], str],
) -> list[str]:
    """Say what valid bucket options do that their user may not expect.

    Args:
        resolution: The training resolution.
        options: Bucket options without a problem.
        is_default: Tells whether an option was left at its default.
        place: Gives the place of an option by its name.
    """
    given = [
        name
        for name in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
        if not is_default(name)
    ]
    if not options.enable_bucket:
        return [f"{place(name)}: no effect without enable_bucket" for name in given]
    if options.bucket_no_upscale:
        limits = [name for name in given if name.endswith("bucket_reso")]
        return [f"{place(name)}: no effect with bucket_no_upscale" for name in limits]
    low, high = rounded_limits(options)
    step = options.bucket_reso_steps
    warnings = []
    if low != options.min_bucket_reso:
        warnings.append(
            f"{place('min_bucket_reso')}: {options.min_bucket_reso} counts as {low}, a multiple of"
            f" bucket_reso_steps {step}"
        )
    if high != options.max_bucket_reso:
        warnings.append(
            f"{place('max_bucket_reso')}: {options.max_bucket_reso} counts as {high}, a multiple of"
            f" bucket_reso_steps {step}"
        )
    if is_default("max_bucket_reso") and high == max(resolution):
        warnings.append(
            f"{place('resolution')}: max_bucket_reso is at its default {high}, no more than the "
            f"resolution {_shown(resolution)}: every bucket that is not square loses area. "
            f"Set max_bucket_reso to {2 * high} for buckets of equal area"
        )
    return warnings


def _shrunk(size: Size, resolution: Size, step: int) -> Size:
    """Give the size to shrink an image to so that its area is no more than the resolution's."""
    area = resolution[0] * resolution[1]
    if size[0] * size[1] <= area:
        return size
    aspect = size[0] / size[1]
    ideal_width = math.sqrt(area * aspect)
    # One side is put on the step grid and the other follows; the better aspect ratio wins.
    width = _rounded(ideal_width) // step * step
    height = _rounded(area / ideal_width) // step * step
    height_of_width = _rounded(width / aspect) // step * step
    width_of_height = _rounded(height * aspect) // step * step
    if not (width and height and height_of_width and width_of_height):
        return (0, 0)
    if abs(width / height_of_width - aspect) < abs(width_of_height / height - aspect):
        return width, _rounded(width / aspect)
    return _rounded(height * aspect), height


def _centred(size: Size, bucket: Size, resized: Size) -> Fit:
    return Fit(
        bucket=bucket,
        resized=resized,
        crop=((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2),
        aspect_error=bucket[0] / bucket[1] - size[0] / size[1],
    )


def _check_fixed(resolution: Size, multiple: int, place: Callable[[str], str]) -> list[Problem]:
    if not any(side % multiple for side in resolution):
        return []
    width, height = (_nearest_multiple(side, multiple) for side in resolution)
    return [
        Problem(
            place=place("resolution"),
            message=f"{_shown(resolution)}: sides must be multiples of {multiple} for this model",
            remedy=f"use {width},{height}, or enable_bucket",
        )
    ]


def _check_limits(
    resolution: Size, options: BucketOptions, place: Callable[[str], str]
) -> list[Problem]:
    problems = []
    low, high = rounded_limits(options)
    step = options.bucket_reso_steps
    if low == 0:
        problems.append(
            Problem(
                place=place("min_bucket_reso"),
                message=f"{options.min_bucket_reso} is less than bucket_reso_steps {step}",
                remedy=f"use at least {step}",
            )
        )
    elif low > min(resolution):
        problems.append(
            Problem(
                place=place("min_bucket_reso"),
                message=f"{low} is more than the shorter side of the resolution "
                f"{_shown(resolution)}",
                remedy=f"use at most {min(resolution) // step * step or step}",
            )
        )
    if high < max(resolution):
        problems.append(
            Problem(
                place=place("max_bucket_reso"),
                message=f"{high} is less than the longer side of the resolution "
                f"{_shown(resolution)}",
                remedy=f"use at least {-(-max(resolution) // step) * step}",
            )
        )
    return problems


def _rounded(value: float) -> int:
    return int(value + 0.5)


def _nearest_multiple(value: int, multiple: int) -> int:
    return max(1, _rounded(value / multiple)) * multiple


def _shown(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
