"""How many samples regularization images make: as many as the training images, as in sd-scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdxl_train.data.records import ImageRecord


def balanced(images: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Set the repeats of regularization images so that they match the training images.

    They are gone through with their own repeats until there are enough samples; those left over
    are not used. If there are too few, they get one more repeat each, over and over.
    """
    missing = sum(image.repeats for image in images if not image.is_reg)
    counts: list[int] = []
    for image in images:
        if image.is_reg and missing > 0:
            counts.append(image.repeats)
            missing -= image.repeats
    if counts and missing > 0:
        each, rest = divmod(missing, len(counts))
        counts = [count + each + (index < rest) for index, count in enumerate(counts)]
    remaining = iter(counts)
    used = []
    for image in images:
        if not image.is_reg:
            used.append(image)
        elif repeats := next(remaining, 0):
            used.append(image._replace(repeats=repeats))
    return used
