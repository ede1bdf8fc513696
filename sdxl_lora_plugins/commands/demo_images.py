"""The pictures of the demo: plain shapes that its base model knows, and zogs that it does not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SIZE: Final = 32
"""Side of a picture in pixels."""
ZOG: Final = "a zog"
"""A word that no model knows: a disc, red above and blue below."""

_COLORS: Final = {"red": (214, 48, 49), "green": (46, 160, 67), "blue": (45, 95, 205)}
_SHAPES: Final = ("circle", "square", "triangle")
_PAPER: Final = (245, 242, 235)
_INK: Final = (40, 30, 30)

_FINE: Final = 8
"""Pictures are drawn this many times larger, then shrunk, which smooths their edges."""
_RADIUS: Final = 10.0
_WANDER: Final = 1.0
"""How far from the middle of the picture a shape may be, in pixels."""

_SHOWN: Final = 96
"""Side of a picture on a sheet."""
_GAP: Final = 6
_STEP: Final = _SHOWN + _GAP
_TITLE: Final = 40
_LABELS: Final = 160

Pictures = list[Image.Image]


def shape_captions() -> list[str]:
    """List the captions of all plain shapes, such as ``a blue square``."""
    return [f"a {color} {shape}" for color in _COLORS for shape in _SHAPES]


def draw(caption: str, chance: random.Random) -> Image.Image:
    """Draw what a caption says, somewhere about the middle."""
    picture = Image.new("RGB", (SIZE * _FINE, SIZE * _FINE), _PAPER)
    pen = ImageDraw.Draw(picture)
    x, y = (_FINE * (SIZE / 2 + chance.uniform(-_WANDER, _WANDER)) for _ in range(2))
    r = _RADIUS * _FINE
    box = (x - r, y - r, x + r, y + r)
    if caption == ZOG:
        pen.chord(box, 180, 360, fill=_COLORS["red"])
        pen.chord(box, 0, 180, fill=_COLORS["blue"])
        return _shrunk(picture)
    _, color, shape = caption.split()
    ink = _COLORS[color]
    if shape == "circle":
        pen.ellipse(box, fill=ink)
    elif shape == "square":
        half = r * math.sqrt(math.pi) / 2  # as large as the circle
        pen.rectangle((x - half, y - half, x + half, y + half), fill=ink)
    else:
        corners = [(x, y - 1.1 * r), (x + 1.1 * r, y + 0.9 * r), (x - 1.1 * r, y + 0.9 * r)]
        pen.polygon(corners, fill=ink)
    return _shrunk(picture)


def write_data_folder(folder: Path, pictures: Mapping[str, Sequence[Image.Image]]) -> None:
    """Write pictures by their captions into a new folder, each beside a file of its caption."""
    folder.mkdir(parents=True)
    for caption, drawn in pictures.items():
        for number, picture in enumerate(drawn, start=1):
            stem = f"{caption.replace(' ', '-')}-{number}"
            picture.save(folder / f"{stem}.png")
            (folder / f"{stem}.txt").write_text(f"{caption}\n", encoding="utf-8")


def sheet(groups: Mapping[str, Mapping[str, Pictures]]) -> Image.Image:
    """Lay pictures out, enlarged, in titled groups side by side.

    Args:
        groups: By title, the pictures by label. The last group tells the order of the labels; each
            label is a row through all groups.
    """
    labels = list(list(groups.values())[-1])
    widths = [_TITLE + _STEP * max(map(len, group.values())) for group in groups.values()]
    size = (_LABELS + sum(widths), _TITLE + _STEP * len(labels))
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(18)
    for row, label in enumerate(labels):
        middle = _TITLE + row * _STEP + _SHOWN // 2
        pen.text((_GAP, middle), label, fill=_INK, font=font, anchor="lm")
    left = _LABELS
    for (title, group), width in zip(groups.items(), widths, strict=True):
        pen.text((left, _TITLE // 2), title, fill=_INK, font=font, anchor="lm")
        for row, label in enumerate(labels):
            for column, picture in enumerate(group.get(label, [])):
                enlarged = picture.resize((_SHOWN, _SHOWN), Image.Resampling.BICUBIC)
                page.paste(enlarged, (left + column * _STEP, _TITLE + row * _STEP))
        left += width
    return page


def _shrunk(picture: Image.Image) -> Image.Image:
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)
