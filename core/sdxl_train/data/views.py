"""How a sample sees its image: where it is cut out, mirrored and coloured.

Everything that is drawn here comes from a generator of the sample's own, so that it depends on the
seed, the epoch and the sample only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import random

    import numpy as np
    from numpy.typing import NDArray

    from sdxl_train.data.buckets import Fit, Size
    from sdxl_train.data.records import ImageRecord

_FACE = re.compile(r"_(\d+)_(\d+)_(\d+)_(\d+)$")

COLOUR_SHARE = 0.33
"""Share of the samples whose colour changes, as in sd-scripts."""
_MOST_HUE = 8 / 180
"""Largest shift of the hue, in turns of the colour circle; so is the next one."""
_MOST_GAMMA = 0.05


class Face(NamedTuple):
    """A face in an image: its centre and size in pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """What differs from time to time. The fields carry the names of the options."""

    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None

    @property
    def unrepeatable(self) -> tuple[str, ...]:
        """The options in use whose results are too many to be cached."""
        names = ("color_aug", "random_crop", "face_crop_aug_range")
        return tuple(name for name in names if getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Colour:
    """A change of colour: a turn of the hue, in parts of the whole circle, and a gamma."""

    hue: float = 0.0
    gamma: float = 1.0


def split_face(stem: str) -> tuple[str, Face | None]:
    """Part a file's stem from the face that it tells: ``a_100_120_40_50``, centre and size."""
    found = _FACE.search(stem)
    if found is None:
        return stem, None
    x, y, width, height = (int(number) for number in found.groups())
    return stem[: found.start()], Face(x, y, width, height)


def random_crop(fit: Fit, rng: random.Random) -> Fit:
    """Cut the bucket out of the resized image anywhere."""
    free = (fit.resized[0] - fit.bucket[0], fit.resized[1] - fit.bucket[1])
    return replace(fit, crop=(rng.randint(0, free[0]), rng.randint(0, free[1])))


def face_crop(
    fit: Fit,
    size: Size,
    face: Face,
    sides: tuple[float, float],
    rng: random.Random,
    *,
    wanders: bool,
) -> Fit:
    """Cut the bucket out around a face.

    The bucket's shorter side shows between ``sides[0]`` and ``sides[1]`` times the face's longer
    side; but the image is never enlarged for that, and always covers the bucket.

    Args:
        fit: How the image gets its training size without its face.
        size: (width, height) of the image.
        face: The face in it.
        sides: The smallest and the largest cut, in faces.
        rng: The only source of chance.
        wanders: Let the cut lie anywhere in the image, most likely at the face.
    """
    cover = max(fit.bucket[0] / size[0], fit.bucket[1] / size[1])
    most = max(cover, 1.0)
    one_face = min(fit.bucket) / max(face.width, face.height, 1)
    scales = [min(max(one_face / side, cover), most) for side in sides]
    scale = rng.uniform(scales[1], scales[0])
    resized, crop = [], []
    for length, bucket, centre in zip(size, fit.bucket, (face.x, face.y), strict=True):
        whole = max(bucket, round(length * scale))
        at = centre * scale
        if wanders:
            reach = max(at, whole - at)
            at += rng.triangular(-reach, reach)
        resized.append(whole)
        crop.append(min(max(round(at - bucket / 2), 0), whole - bucket))
    return replace(fit, resized=(resized[0], resized[1]), crop=(crop[0], crop[1]))


def drawn_fit(image: ImageRecord, options: ViewOptions, rng: random.Random) -> Fit:
    """Draw where an image is cut out: around its face, if it tells one, or anywhere."""
    face = split_face(image.path.stem)[1]
    if options.face_crop_aug_range and face:
        sides = options.face_crop_aug_range
        return face_crop(image.fit, image.size, face, sides, rng, wanders=options.random_crop)
    return random_crop(image.fit, rng) if options.random_crop else image.fit


def draw_colour(rng: random.Random) -> Colour | None:
    """Draw a change of colour; None mostly."""
    if rng.random() >= COLOUR_SHARE:
        return None
    if rng.random() < 0.5:
        return Colour(hue=rng.uniform(-_MOST_HUE, _MOST_HUE))
    return Colour(gamma=rng.uniform(1 - _MOST_GAMMA, 1 + _MOST_GAMMA))


def coloured(pixels: NDArray[np.uint8], colour: Colour) -> NDArray[np.uint8]:
    """Change the colour of pixels, uint8 [H, W, 3].

    The gamma acts on values in [0, 1]; sd-scripts takes the power of values up to 255 and cuts it
    off, which mostly changes the brightness.
    """
    import numpy as np
    from PIL import Image

    if colour.gamma != 1.0:
        table = np.rint((np.arange(256) / 255.0) ** colour.gamma * 255.0).astype(np.uint8)
        return table[pixels]
    hue, saturation, value = Image.fromarray(pixels).convert("HSV").split()
    turn = round(colour.hue * 256)
    turned = hue.point([(level + turn) % 256 for level in range(256)])
    return np.array(Image.merge("HSV", (turned, saturation, value)).convert("RGB"))
