"""What is remembered of files, and that it is believed only while they are untouched."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from sdxl_train.data.images import ImageError
from sdxl_train.data.scan_index import ScanIndex

if TYPE_CHECKING:
    from pathlib import Path

    from tests.core.data.conftest import MakeImage


@pytest.fixture
def picture(tmp_path: Path, make_image: MakeImage) -> Path:
    """An image that has lain there for longer than a tick of the file system's clock."""
    path = make_image(tmp_path / "cats" / "a.png", caption="a cat")
    time.sleep(0.06)
    return path


def refuse(path: Path) -> None:
    raise AssertionError(f"{path} was opened")


def test_an_untouched_file_is_not_opened_again(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ScanIndex(tmp_path / "home")
    header, caption = first.header(picture), first.caption(picture.with_suffix(".txt"))
    first.check_pixels(picture)
    first.save()
    for reader in ("read_header", "read_caption", "load_image"):
        monkeypatch.setattr(f"sdxl_train.data.scan_index.{reader}", refuse)
    second = ScanIndex(tmp_path / "home")
    assert second.header(picture) == header
    assert second.caption(picture.with_suffix(".txt")) == caption
    second.check_pixels(picture)


def test_an_edit_that_keeps_length_and_time_is_seen(tmp_path: Path, picture: Path) -> None:
    caption = picture.with_suffix(".txt")
    first = ScanIndex(tmp_path / "home")
    first.caption(caption)
    first.content(caption)
    first.save()
    before = caption.stat()
    caption.write_text("a dog", encoding="utf-8")
    os.utime(caption, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert caption.stat().st_mtime_ns == before.st_mtime_ns
    second = ScanIndex(tmp_path / "home")
    assert second.caption(caption).text == "a dog"
    assert second.content(caption) != first.content(caption)
    assert not first.is_unchanged(caption)


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, make_image: MakeImage) -> None:
    path = make_image(tmp_path / "cats" / "a.png")
    ahead = time.time_ns() + 10**9
    os.utime(path, ns=(ahead, ahead))
    first = ScanIndex(tmp_path / "home")
    first.header(path)
    first.save()
    assert not ScanIndex(tmp_path / "home").knows_image(path, decoded=False)


@pytest.mark.parametrize("content", [b"", b"[1, {", b'[99, {"a.png": {}}]', b'[1, {"a.png": 3}]'])
def test_a_damaged_index_is_as_good_as_none(tmp_path: Path, picture: Path, content: bytes) -> None:
    first = ScanIndex(tmp_path / "home")
    first.header(picture)
    first.save()
    (file,) = (tmp_path / "home").iterdir()
    file.write_bytes(content)
    second = ScanIndex(tmp_path / "home")
    assert not second.knows_image(picture, decoded=False)
    assert second.header(picture).size == (64, 64)


def test_faults_are_not_remembered(tmp_path: Path, picture: Path) -> None:
    good = picture.read_bytes()
    picture.write_bytes(good[: len(good) // 2])
    index = ScanIndex(tmp_path / "home")
    with pytest.raises(ImageError):
        index.header(picture)
    index.save()
    picture.write_bytes(good)
    assert ScanIndex(tmp_path / "home").header(picture).size == (64, 64)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    pipe = tmp_path / "cats" / "pipe.png"
    os.mkfifo(pipe)  # opening it for reading would wait for a writer for ever
    with pytest.raises(ImageError, match="is not a regular file"):
        ScanIndex().header(pipe)
    Image.new("RGB", (8, 8)).save(tmp_path / "cats" / "a.png")
    assert ScanIndex().header(tmp_path / "cats" / "a.png").size == (8, 8)
