"""Image files: their size without decoding them, and their pixels, upright and in RGB.

Pillow is imported when first needed: it is not part of asking for help.
"""

from __future__ import annotations

import importlib.util
import struct
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from sdxl_train.data.buckets import Size  # noqa: TC001 - pydantic reads it for the scan's index

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from sdxl_train.data.buckets import Fit

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}

# fmt: off
OTHER_IMAGE_EXTENSIONS = frozenset({
    ".gif", ".tif", ".tiff", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg",
    ".ico", ".tga", ".exr", ".hdr", ".raw", ".dng", ".cr2", ".nef", ".arw",
    ".avif", ".apng", ".jfif", ".ppm", ".pgm", ".qoi",
})
# fmt: on
"""Endings of image files that are left out, with a warning."""

_MAGIC = (
    (b"GIF8", "a GIF"),
    (b"II*\x00", "a TIFF"),
    (b"MM\x00*", "a TIFF"),
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the image itself"),
)


class ImageError(Exception):
    """An image cannot be used; the message says why, without its path."""


class ImageHeader(NamedTuple):
    """What the head of an image file tells.

    Attributes:
        size: (width, height), upright.
        format: Its true format, whatever the name says: ``JPEG``.
        misnamed: Whether the name's ending belongs to another format.
        transparent: Whether it has transparency.
        grey: Whether it has no colour.
        animated: Whether it is a film, of which the first picture counts.
    """

    size: Size
    format: str
    misnamed: bool
    transparent: bool
    grey: bool
    animated: bool


@cache
def formats() -> dict[str, str]:
    """Give the supported formats by file ending, in lower case."""
    has_avif = importlib.util.find_spec("PIL._avif") is not None
    return _FORMATS | ({".avif": "AVIF"} if has_avif else {})


def is_image_name(name: str) -> bool:
    """Tell by its name whether a file is an image of a supported format; case does not matter."""
    return bool(image_names([name]))


def image_names(names: Iterable[str]) -> list[str]:
    """Give the names that are those of images of supported formats."""
    endings = _endings()
    return [name for name in names if name.lower().endswith(endings) and name[0] != "."]


@cache
def _endings() -> tuple[str, ...]:
    return tuple(formats())


def read_header(path: Path) -> ImageHeader:
    """Read size and kind without decoding the pixels.

    A file whose end is not where it should be is decoded after all, to find out whether it is cut.

    Raises:
        ImageError: If it is not an image, is cut off, or has another fault.
    """
    with _open(path) as image:
        _check_end(path, image)
        width, height = image.size
        format_ = "JPEG" if image.format == "MPO" else str(image.format)
        return ImageHeader(
            size=(height, width) if _orientation(image) >= 5 else (width, height),
            format=format_,
            misnamed=formats().get(path.suffix.lower(), format_) != format_,
            transparent=image.has_transparency_data,
            grey=image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;"),
            # Telephones put a preview behind a photograph, which makes no film of it (MPO).
            animated=format_ != "JPEG" and getattr(image, "is_animated", False),
        )


def load_image(path: Path) -> Image.Image:
    """Load an image as 8-bit RGB, upright, transparency laid on white.

    Raises:
        ImageError: If it cannot be decoded.
    """
    with _open(path) as image:
        turn = _TURNS.get(_orientation(image))
        _decode(path, image)
        upright = _to_rgb(image)
    return upright.transpose(turn) if turn is not None else upright


def load_with_alpha(path: Path) -> tuple[Image.Image, Image.Image]:
    """Load an image as 8-bit RGB as it is under its transparency, and its alpha channel apart.

    Without transparency the alpha is 255 everywhere. Both are upright.

    Raises:
        ImageError: If it cannot be decoded.
    """
    with _open(path) as image:
        turn = _TURNS.get(_orientation(image))
        _decode(path, image)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            pair = layer.convert("RGB"), layer.getchannel("A")
        else:
            rgb = _to_rgb(image)
            pair = rgb, rgb.getchannel("R").point([255] * 256)
    return pair if turn is None else (pair[0].transpose(turn), pair[1].transpose(turn))


def load_mask(path: Path) -> Image.Image:
    """Load a mask as 8-bit grey, upright: the red channel where it has colour, as in sd-scripts.

    Raises:
        ImageError: If it cannot be decoded.
    """
    return load_with_alpha(path)[0].getchannel("R")


def fit_image(image: Image.Image, fit: Fit, interpolation: str | None = None) -> NDArray[np.uint8]:
    """Resize and crop to the training size.

    Without an interpolation of its own, shrinking on both sides uses Pillow's Hamming filter: of
    its filters the nearest, over all factors, to averaging by area, which sd-scripts does with
    OpenCV (Pillow's own box filter does not weigh partly covered pixels and leaves jagged edges).
    Otherwise Lanczos, as there.

    Args:
        image: 8-bit RGB or grey.
        fit: Where the training size lies in it.
        interpolation: One of ``dataset_options.Interpolation``; ``area`` is the Hamming filter.

    Returns:
        uint8 [height, width, 3], or [height, width] of grey.
    """
    import numpy as np
    from PIL.Image import Resampling

    if image.size != fit.resized:
        shrinks = fit.resized[0] <= image.width and fit.resized[1] <= image.height
        name = _RESAMPLING[interpolation or ("area" if shrinks else "lanczos")]
        image = image.resize(fit.resized, Resampling[name])
    left, top = fit.crop
    box = (left, top, left + fit.bucket[0], top + fit.bucket[1])
    return np.array(image.crop(box))


_RESAMPLING = {
    "lanczos": "LANCZOS",
    "nearest": "NEAREST",
    "bilinear": "BILINEAR",
    "linear": "BILINEAR",
    "bicubic": "BICUBIC",
    "cubic": "BICUBIC",
    "area": "HAMMING",
    "box": "BOX",
}
"""Pillow's filter by the name of an interpolation."""

# The transposition that undoes each EXIF orientation (EXIF 2.3, tag 0x0112), as Pillow numbers
# them: FLIP_LEFT_RIGHT 0, FLIP_TOP_BOTTOM 1, ROTATE_90 2 (counter-clockwise), ROTATE_180 3,
# ROTATE_270 4, TRANSPOSE 5, TRANSVERSE 6.
_TURNS: dict[int, Any] = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}


def _open(path: Path) -> Image.Image:
    from PIL import Image

    try:
        return Image.open(path, formats=sorted(set(formats().values())))
    except Image.DecompressionBombError as error:
        raise ImageError(str(error)) from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ImageError(_reason(path, error)) from None


def _decode(path: Path, image: Image.Image) -> None:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ImageError(_reason(path, error)) from None


def _reason(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as unreadable:
        return f"cannot be read: {unreadable.strerror}"
    if not head:
        return "is empty (0 bytes)"
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return f"is {name}, in spite of its name"
    if head.lstrip()[:1] in (b"<", b"{", b"["):
        start = head.lstrip()[:20].decode("utf-8", "replace").split("\n")[0]
        return f"is not an image: it starts with {start!r}"
    if type(error).__name__ == "UnidentifiedImageError":
        return "is not an image, or its head is damaged"
    return f"is damaged: {error}"


def _orientation(image: Image.Image) -> int:
    """Read the EXIF orientation from the file's head: 1 (upright) to 8."""
    from PIL import Image

    try:
        # The base class's method: the one for PNG would decode the whole image first.
        value = Image.Image.getexif(image).get(0x0112)
    except (SyntaxError, struct.error):  # EXIF data that is not EXIF turns nothing
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_end(path: Path, image: Image.Image) -> None:
    """Decode the image if the end of its file is missing."""
    length = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(-min(length, 16), 2)
        tail = file.read()
    match image.format:
        case "JPEG" | "MPO":
            complete = tail.endswith(b"\xff\xd9")
        case "PNG":
            complete = b"IEND" in tail
        case "WEBP":
            complete = length >= 8 + int.from_bytes(head[4:8], "little")
        case "BMP":
            complete = 0 < int.from_bytes(head[2:6], "little") <= length
        case _:
            complete = False
    if not complete:
        _decode(path, image)


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would clip it at 255."""
    import numpy as np
    from PIL import Image

    grey = np.asarray(image).astype(np.float64) / 257.0
    return Image.fromarray(np.rint(np.clip(grey, 0, 255)).astype(np.uint8)).convert("RGB")
