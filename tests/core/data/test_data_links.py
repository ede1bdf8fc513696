"""Files that reach out of a dataset, or are far larger than what they should be.

The numbers are those of docs/bad-inputs.md.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import TYPE_CHECKING

import pytest

from sdxl_train.data.captions import MOST_BYTES
from sdxl_train.data.dataset_config import DatasetOptions, resolve_datasets
from sdxl_train.data.images import ImageError, load_image, read_header
from sdxl_train.data.sources import Scan, scan

if TYPE_CHECKING:
    from pathlib import Path

    from tests.core.data.conftest import MakeImage, MakeScan


def scanned_without_bad_ones(folder: Path) -> Scan:
    """Scan as ``--on_bad_image skip`` does."""
    options = DatasetOptions(train_data_dir=folder, resolution=64)
    configs, problems, _ = resolve_datasets(options, lambda option: f"--{option}")
    assert problems == []
    found = scan(configs, bucket_multiple=8, place=lambda option: f"--{option}", skip_bad=True)
    assert found.problems == ()
    return found


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that says it has so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [30_000, 2**31 - 1])
def test_an_image_that_would_fill_the_memory_is_refused_11(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side))
    for read in (read_header, load_image):
        with pytest.raises(ImageError):
            read(path)


def test_a_bomb_of_legal_size_is_named_with_its_pixels_11(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    folder = make_image(tmp_path / "1_cat" / "a.png").parent
    (folder / "bomb.png").write_bytes(png(30_000, 30_000))
    (problem,) = make_scan(train_data_dir=tmp_path).problems
    assert problem.place == str(folder / "bomb.png")
    assert "900000000 pixels" in problem.message


def test_links_that_lead_nowhere_are_told_14(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    folder = make_image(tmp_path / "data" / "1_cat" / "a.png").parent
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    problems = make_scan(train_data_dir=tmp_path / "data").problems
    assert {problem.place for problem in problems} == {
        str(folder / "gone.png"),
        str(folder / "loop.png"),
    }
    left = scanned_without_bad_ones(tmp_path / "data")
    assert [image.path.name for image in left.datasets[0].images] == ["a.png"]


def test_links_out_of_the_folder_are_refused(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    """A dataset that somebody made must not put private files into a network."""
    folder = make_image(tmp_path / "data" / "1_cat" / "a.png", caption="a").parent
    make_image(folder / "b.png")
    private = make_image(tmp_path / "private.png")
    (tmp_path / "private.txt").write_text("my name", encoding="utf-8")
    (folder / "inside.png").symlink_to("a.png")
    (folder / "inside.txt").symlink_to(folder / "a.txt")
    assert make_scan(train_data_dir=tmp_path / "data").problems == ()

    (folder / "outside.png").symlink_to(private)
    (folder / "b.txt").symlink_to("../../private.txt")
    problems = make_scan(train_data_dir=tmp_path / "data").problems
    assert {(problem.place, problem.message) for problem in problems} == {
        (str(folder / "outside.png"), f"is a link out of the folder, to {private}"),
        (str(folder / "b.txt"), "is a link out of the folder, to ../../private.txt"),
    }
    left = scanned_without_bad_ones(tmp_path / "data")
    assert [image.path.name for image in left.datasets[0].images] == ["a.png", "inside.png"]


def test_the_folder_itself_may_be_a_link(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    real = make_image(tmp_path / "real" / "a.png", caption="a").parent
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1_cat").symlink_to(real)
    (real / "b.png").symlink_to("a.png")
    found = make_scan(train_data_dir=tmp_path / "data")
    assert found.problems == ()
    assert len(found.datasets[0].images) == 2


@pytest.mark.parametrize("name", ["../private.png", "sub/../../private.png", "{}/private.png"])
def test_names_in_a_metadata_file_do_not_leave_the_folder(
    name: str, tmp_path: Path, make_image: MakeImage
) -> None:
    make_image(tmp_path / "private.png")
    make_image(tmp_path / "data" / "sub" / "a.png")
    found = annotated(tmp_path, name.format(tmp_path))
    assert next(problem.message for problem in found.problems) in (
        "leads upwards by '..'",
        f"does not lie in {tmp_path / 'data'}",
    )


def annotated(folder: Path, name: str) -> Scan:
    """Scan the folder ``data`` with a metadata file that names one image."""
    (folder / "meta.json").write_text(json.dumps({name: {"caption": "a"}}), encoding="utf-8")
    (folder / "data.toml").write_text(
        f"[general]\nresolution = 64\n[[datasets]]\n[[datasets.subsets]]\n"
        f"metadata_file = '{folder / 'meta.json'}'\nimage_dir = '{folder / 'data'}'\n",
        encoding="utf-8",
    )
    options = DatasetOptions(dataset_config=folder / "data.toml")
    configs, problems, _ = resolve_datasets(options, lambda option: f"--{option}")
    assert problems == []
    return scan(configs, bucket_multiple=8, place=lambda option: f"--{option}")


def test_a_caption_file_that_is_none_is_told_by_its_size_30(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan
) -> None:
    path = make_image(tmp_path / "1_cat" / "a.png", caption="cat, " * 10)
    assert make_scan(train_data_dir=tmp_path).problems == ()
    path.with_suffix(".txt").write_text("cat, " * (MOST_BYTES // 4), encoding="utf-8")
    (problem,) = make_scan(train_data_dir=tmp_path).problems
    assert problem.place == str(path.with_suffix(".txt"))
    assert f"{MOST_BYTES:,}: is it one?" in problem.message
