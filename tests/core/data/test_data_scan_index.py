"""What is remembered of files, and that it is believed only while they are untouched."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from sdxl_train.data.dataset_config import resolve_datasets
from sdxl_train.data.dataset_options import DatasetOptions
from sdxl_train.data.images import ImageError
from sdxl_train.data.scan_index import ScanIndex
from sdxl_train.data.sources import scan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdxl_train.data.sources import Scan
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
    index = ScanIndex(tmp_path / "home")
    first = index.folder(picture.parent)
    header, caption = first.header("a.png"), first.caption("a.txt")
    first.check_pixels("a.png")
    index.save()
    for reader in ("read_header", "read_caption", "load_image"):
        monkeypatch.setattr(f"sdxl_train.data.scan_index.{reader}", refuse)
    second = ScanIndex(tmp_path / "home").folder(picture.parent)
    image, nothing, text = second.recall(["a.png", None, "a.txt"])
    assert nothing is None
    assert image is not None
    assert second.kept.sound[image]
    assert second.kept.headers[image] == second.header("a.png") == header
    assert text is not None
    assert second.kept.caption(text) == second.caption("a.txt") == caption
    second.check_pixels("a.png")


def test_an_edit_that_keeps_length_and_time_is_seen(tmp_path: Path, picture: Path) -> None:
    caption = picture.with_suffix(".txt")
    index = ScanIndex(tmp_path / "home")
    first = index.folder(picture.parent)
    first.caption("a.txt")
    first.content("a.txt")
    index.save()
    before = caption.stat()
    caption.write_text("a dog", encoding="utf-8")
    os.utime(caption, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert caption.stat().st_mtime_ns == before.st_mtime_ns
    second = ScanIndex(tmp_path / "home").folder(picture.parent)
    assert second.caption("a.txt").text == "a dog"
    assert second.content("a.txt") != first.content("a.txt")
    assert not index.is_unchanged(caption)


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, make_image: MakeImage) -> None:
    path = make_image(tmp_path / "cats" / "a.png")
    ahead = time.time_ns() + 10**9
    os.utime(path, ns=(ahead, ahead))
    first = ScanIndex(tmp_path / "home")
    first.folder(path.parent).header("a.png")
    first.save()
    second = ScanIndex(tmp_path / "home").folder(path.parent)
    assert second.recall(["a.png"]) == [None]


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda data: data[:-9],
        lambda data: data.replace(b'"format":', b'"format":9'),
        lambda data: data.replace(b'"headers":"00', b'"headers":"07'),
        lambda data: data.replace(b'"headers":"00000000', b'"headers":"'),
        lambda data: data.replace(b'"sound":"0', b'"sound":"?'),
        lambda data: data.replace(b'"marks":"', b'"marks":"00'),
        lambda data: data.replace(b'"marks":"', b'"marks":"' + 32 * b"00"),
        lambda data: data.replace(b'"odd_captions":{', b'"odd_captions":{"3":["",[],null]'),
        lambda data: data.replace(b'"captions":"', b'"captions":"\\t'),
    ],
    ids=[
        "empty",
        "cut",
        "later version",
        "no such kind",
        "short",
        "type",
        "stamp",
        "stamps",
        "caption",
        "captions",
    ],
)
def test_a_damaged_index_is_as_good_as_none(
    tmp_path: Path, picture: Path, damage: Callable[[bytes], bytes]
) -> None:
    first = ScanIndex(tmp_path / "home")
    first.folder(picture.parent).header("a.png")
    first.save()
    (file,) = (tmp_path / "home").iterdir()
    data = file.read_bytes()
    assert damage(data) != data
    file.write_bytes(damage(data))
    second = ScanIndex(tmp_path / "home").folder(picture.parent)
    assert second.recall(["a.png"]) == [None]
    assert second.header("a.png").size == (64, 64)


def untouched(images: Path, masks: Path) -> None:
    pass


def rewritten(path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, "red").save(path)


@pytest.mark.parametrize(
    "change",
    [
        untouched,
        lambda images, masks: rewritten(images / "b.png", (96, 80)),
        lambda images, masks: rewritten(masks / "b.png", (96, 80)),
        lambda images, masks: (images / "b.txt").write_text("b dog"),
        lambda images, masks: (images / "b.txt").unlink(),
        lambda images, masks: (images / "b.caption").write_text("b dog"),
        lambda images, masks: (images / "b.png").unlink(),
        lambda images, masks: (images / "b.txt").replace(images / "c.txt"),
        lambda images, masks: shutil.copy(images / "b.png", images / "c.png"),
        lambda images, masks: [shutil.copy(f / "b.png", f / "z.png") for f in (images, masks)],
        lambda images, masks: (images / "b.png").replace(images / "a.png"),
    ],
    ids=[
        "nothing", "image", "mask", "caption", "caption gone", "other caption", "image gone",
        "caption moved", "image copied", "image added", "image replaced",
    ],
)  # fmt: skip
def test_a_second_start_finds_what_a_first_one_would(
    tmp_path: Path, make_image: MakeImage, change: Callable[[Path, Path], object]
) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    for name in "abc":
        make_image(images / f"{name}.png", (64, 80), caption=f"{name} cat")
        make_image(masks / f"{name}.png", (64, 80))
    file = tmp_path / "data.toml"
    file.write_text(
        "[[datasets]]\n[[datasets.subsets]]\n"
        f"image_dir = '{images}'\nconditioning_data_dir = '{masks}'\n"
    )
    configs, problems, _ = resolve_datasets(
        DatasetOptions(dataset_config=file, resolution=64, masked_loss=True), str
    )
    assert problems == []

    def found(index: ScanIndex) -> Scan:
        scanned = scan(configs, bucket_multiple=8, place=str, index=index)
        assert index.save() is None
        return replace(scanned, index=index)

    time.sleep(0.06)  # a tick of the file system's clock
    home = tmp_path / "home"
    before = found(ScanIndex(home))
    change(images, masks)
    second, fresh = found(ScanIndex(home)), found(ScanIndex())
    assert replace(second, index=fresh.index) == fresh
    seen = second != replace(before, index=second.index)
    assert seen == (change is not untouched)


def test_faults_are_not_remembered(tmp_path: Path, picture: Path) -> None:
    good = picture.read_bytes()
    picture.write_bytes(good[: len(good) // 2])
    index = ScanIndex(tmp_path / "home")
    with pytest.raises(ImageError):
        index.folder(picture.parent).header("a.png")
    index.save()
    picture.write_bytes(good)
    assert ScanIndex(tmp_path / "home").folder(picture.parent).header("a.png").size == (64, 64)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    pipe = tmp_path / "cats" / "pipe.png"
    os.mkfifo(pipe)  # opening it for reading would wait for a writer for ever
    with pytest.raises(ImageError, match="is not a regular file"):
        ScanIndex().folder(pipe.parent).header("pipe.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "cats" / "a.png")
    assert ScanIndex().folder(tmp_path / "cats").header("a.png").size == (8, 8)
