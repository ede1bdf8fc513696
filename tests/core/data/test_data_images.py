"""Images as they come: turned, transparent, deep, grey, misnamed, broken."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from sdxl_train.data.buckets import Fit, fit_to_nearest
from sdxl_train.data.images import (
    ImageError,
    fit_image,
    formats,
    is_image_name,
    load_image,
    read_header,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.core.data.conftest import MakeImage

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters() -> Image.Image:
    """An image 32 wide, 48 high: red, green above blue, white."""
    image = Image.new("RGB", (32, 48))
    corners = [(0, 0), (16, 0), (0, 24), (16, 24)]
    for corner, colour in zip(corners, (RED, GREEN, BLUE, WHITE), strict=True):
        image.paste(colour, (*corner, corner[0] + 16, corner[1] + 24))
    return image


# How a camera stores an upright picture for each EXIF orientation (EXIF 2.3, 4.6.4 A): the array
# of the upright picture, turned so that the tag's transformation brings it back.
STORED: dict[int, Any] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, ending: str, orientation: int) -> None:
    upright = np.asarray(quarters())
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    stored.save(path, exif=exif, quality=95)
    assert read_header(path).size == (32, 48)
    loaded = np.asarray(load_image(path)).astype(int)
    for row, column in ((12, 8), (12, 24), (36, 8), (36, 24)):
        assert np.abs(loaded[row, column] - upright[row, column]).max() < 12


def pixel(path: Path) -> tuple[int, ...]:
    image = load_image(path)
    assert image.mode == "RGB"
    found = image.getpixel((3, 3))
    assert isinstance(found, tuple)
    return tuple(int(value) for value in found)


def test_every_kind_of_pixel_becomes_rgb(tmp_path: Path) -> None:
    grey16 = np.full((32, 32), 25700, dtype=np.uint16)  # 25700 / 257 = 100
    Image.fromarray(grey16).save(tmp_path / "grey16.png")
    Image.new("L", (32, 32), 100).save(tmp_path / "grey.png")
    Image.new("1", (32, 32), 1).save(tmp_path / "bits.png")
    Image.new("RGB", (32, 32), RED).quantize(4).save(tmp_path / "palette.png")
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    Image.new("RGB", (32, 32), BLUE).save(tmp_path / "plain.bmp")
    assert pixel(tmp_path / "grey16.png") == (100, 100, 100)
    assert pixel(tmp_path / "grey.png") == (100, 100, 100)
    assert pixel(tmp_path / "bits.png") == WHITE
    assert pixel(tmp_path / "palette.png") == RED
    assert np.abs(np.subtract(pixel(tmp_path / "cmyk.jpg"), RED)).max() < 5
    assert pixel(tmp_path / "plain.bmp") == BLUE


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (32, 32), (0, 0)).save(tmp_path / "grey.png")
    Image.new("RGBA", (32, 32), (0, 0, 0, 51)).save(tmp_path / "veil.png")
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    for name in ("clear.png", "grey.png", "palette.png"):
        assert pixel(tmp_path / name) == WHITE
        assert read_header(tmp_path / name).transparent
    assert pixel(tmp_path / "veil.png") == (204, 204, 204)  # 255 * (1 - 51/255)


def test_the_true_format_counts_not_the_name(tmp_path: Path, make_image: MakeImage) -> None:
    path = make_image(tmp_path / "a.webp").rename(tmp_path / "a.jpg")
    header = read_header(path)
    assert (header.format, header.misnamed, header.size) == ("WEBP", True, (64, 64))
    assert not read_header(make_image(tmp_path / "b.JPEG")).misnamed


def encoded(kind: str) -> bytes:
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("zero.png", b"", "is empty (0 bytes)"),
        ("page.png", b"<!DOCTYPE html><html>", "it starts with '<!DOCTYPE html><html"),
        ("error.jpg", b'{"error": "not found"}', 'it starts with \'{"error"'),
        ("moving.png", b"GIF89a" + bytes(30), "is a GIF"),
        ("scan.jpg", b"II*\x00" + bytes(30), "is a TIFF"),
        ("lfs.png", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("noise.webp", bytes(range(64)), "is not an image"),
        ("head.png", encoded("PNG")[:20], "is damaged"),
        ("cut.png", encoded("PNG")[:-4000], "is damaged"),
        ("cut.jpg", encoded("JPEG")[:-1500], "is damaged"),
        ("cut.webp", encoded("WEBP")[:-500], "is damaged"),
        ("cut.bmp", encoded("BMP")[:-3000], "is damaged"),
    ],
)
def test_broken_files_are_told_before_training(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ImageError) as error:
        read_header(path)
    assert reason in str(error.value)
    with pytest.raises(ImageError):
        load_image(path)


def test_bytes_after_the_end_do_no_harm(tmp_path: Path) -> None:
    for kind, name in (("PNG", "a.png"), ("JPEG", "a.jpg")):
        (tmp_path / name).write_bytes(encoded(kind) + b"trailing bytes of some camera")
        assert read_header(tmp_path / name).size == (64, 64)


def test_headers_of_whole_files_are_read_without_decoding(
    tmp_path: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [make_image(tmp_path / name) for name in ("a.png", "a.jpg", "a.webp", "a.bmp")]

    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("sdxl_train.data.images._decode", refuse)
    assert [read_header(path).size for path in paths] == [(64, 64)] * 4


def test_endings_count_in_any_case_and_hidden_files_do_not() -> None:
    assert all(is_image_name(name) for name in ("a.Jpg", "a.PNG", "-b.c.jpeg", "ä 猫.webp"))
    assert not any(
        is_image_name(name) for name in ("._a.png", "a.gif", "a.txt", "png", "Thumbs.db")
    )
    assert set(formats()) >= {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def area_average(image: NDArray[np.uint8], width: int, height: int) -> Any:
    """Average over the exact area of each target pixel, partly covered ones by their share."""

    def weights(old: int, new: int) -> Any:
        edges = np.arange(new + 1) * old / new
        starts = np.arange(old)
        overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
        return np.clip(overlap, 0, None) * new / old

    rows, columns = weights(image.shape[0], height), weights(image.shape[1], width)
    return np.einsum("ih,hwc,jw->ijc", rows, image, columns, optimize=True)


@pytest.mark.parametrize("size", [(490, 490), (350, 320), (200, 210)])
def test_shrinking_is_near_to_averaging_by_area(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    photo = Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC)
    fit = Fit(bucket=size, resized=size, crop=(0, 0), aspect_error=0.0)
    expected = area_average(np.asarray(photo), *size)
    error = np.abs(fit_image(photo, fit) - expected).mean()
    box = np.abs(np.asarray(photo.resize(size, Image.Resampling.BOX)) - expected).mean()
    assert error < min(box, 2.0)


def test_resized_images_are_cropped_in_the_middle() -> None:
    stripes = np.zeros((64, 128, 3), dtype=np.uint8)
    stripes[:, 32:96] = 200
    fit = fit_to_nearest((128, 64), [(64, 64)])
    assert fit.crop == (32, 0)
    assert (fit_image(Image.fromarray(stripes), fit) == 200).all()
