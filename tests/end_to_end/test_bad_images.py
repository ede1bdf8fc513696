"""Bad images, by the numbers of the catalogue of bad inputs: each is told, mended or left out.

Every case is a real file. Problems stop the run before it starts; ``--on_bad_image skip`` leaves
the file out.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

import sdxl_train
from sdxl_train.cli import main
from sdxl_train.data.images import load_image
from sdxl_train.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.end_to_end.conftest import CheckRun, MakeOptions, TrainLora

SIZE = (64, 64)
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def picture(size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(COLOURS).resize(size)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def huge_png() -> bytes:
    """The head of a PNG of 30 000 x 30 000 pixels, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one good image with a caption."""
    folder = tmp_path / "1_cat"
    folder.mkdir()
    picture().save(folder / "good.png")
    (folder / "good.txt").write_text("a cat", encoding="utf-8")
    return folder


BAD: list[tuple[str, str, Callable[[], bytes], str]] = [
    ("01-zero-bytes", "x.png", lambda: b"", "is empty (0 bytes)"),
    (
        "02-truncated-jpeg",
        "x.jpg",
        lambda: encoded(picture((256, 256)), "JPEG")[:-900],
        "damaged",
    ),
    ("02-truncated-png", "x.png", lambda: encoded(picture(), "PNG")[:-200], "damaged"),
    (
        "02-damaged-pixels",
        "x.png",
        lambda: encoded(picture(), "PNG").replace(b"IDAT", b"IDAT\0\0", 1),
        "damaged",
    ),
    ("03-html", "x.png", lambda: b"<html><body>404", "not an image: it starts with '<html>"),
    ("03-text", "x.png", lambda: b"just words", "is not an image"),
    ("03-lfs-pointer", "x.png", lambda: b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
    ("09-one-pixel", "x.png", lambda: encoded(picture((1, 1)), "PNG"), "1x1 is less than 32"),
    ("11-bomb", "x.png", huge_png, "exceeds limit of"),
]


@pytest.mark.parametrize(
    ("name", "content", "reason"), [pytest.param(*c[1:], id=c[0]) for c in BAD]
)
def test_a_bad_image_stops_the_run_or_is_left_out(
    folder: Path, check_run: CheckRun, name: str, content: Callable[[], bytes], reason: str
) -> None:
    path = folder / name
    path.write_bytes(content())
    (folder / "x.txt").write_text("bad", encoding="utf-8")
    (problem,), _ = check_run(train_data_dir=str(folder.parent))
    assert problem.startswith(f"{path}: ")
    assert reason in problem
    assert "--on_bad_image skip" in problem
    problems, warnings = check_run(train_data_dir=str(folder.parent), on_bad_image="skip")
    assert problems == []
    (told,) = [text for text in warnings if "left out (--on_bad_image skip)" in text]
    assert told.startswith("1 file: ")
    assert str(path) in told


def test_the_command_tells_all_bad_images_at_once(
    folder: Path, options: MakeOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    for case, name, content, _ in BAD:
        (folder / f"{case}{Path(name).suffix}").write_bytes(content())
    chosen = options(train_data_dir=str(folder.parent), plugin=None)
    words = [word for key, value in chosen.items() for word in (f"--{key}", str(value))]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert f"{len(BAD)} problems, nothing was started" in told
    for case, name, _, reason in BAD:
        line = next(x for x in told.splitlines() if f"{case}{Path(name).suffix}" in x)
        assert reason in line
    assert "Traceback" not in told
    assert not list(Path(chosen["output_dir"]).iterdir())


def test_04_a_wrong_ending_is_read_for_what_it_is(folder: Path, check_run: CheckRun) -> None:
    (folder / "w.jpg").write_bytes(encoded(picture(), "WEBP"))
    _, warnings = check_run(train_data_dir=str(folder.parent))
    assert any(f"in truth WEBP, read as that: {folder / 'w.jpg'}" in text for text in warnings)


def test_05_other_types_are_told_and_case_does_not_matter(
    folder: Path, options: MakeOptions
) -> None:
    for name in ("a.gif", "b.tiff", "c.heic"):
        (folder / name).write_bytes(b"whatever")
    picture().save(folder / "d.Jpg", "JPEG")
    plan = sdxl_train.plan(options(train_data_dir=str(folder.parent)))
    assert plan.dataset["images"] == 2
    for ending in (".gif", ".tiff", ".heic"):
        assert any(f"image type {ending} is not supported" in text for text in plan.warnings)
        assert any(item["path"].endswith(ending) for item in plan.dataset["skipped"])


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_270),
        (8, Image.Transpose.ROTATE_90),
    ],
    ids=["06-upside-down", "06-turned-left", "06-turned-right"],
)
def test_06_turned_photographs_stand_upright(
    folder: Path, options: MakeOptions, orientation: int, turn: Image.Transpose
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = picture((128, 64))
    path = folder / "turned.png"
    lying.save(path, exif=exif)
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(lying.transpose(turn)))
    plan = sdxl_train.plan(options(train_data_dir=str(folder.parent)))
    # At half their size.
    upright = [32, 64] if orientation in (6, 8) else [64, 32]
    assert upright in [bucket["resolution"] for bucket in plan.dataset["buckets"]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_07_transparent_pixels_are_white(folder: Path, check_run: CheckRun, mode: str) -> None:
    image = picture().convert("RGBA")
    image.putalpha(Image.new("L", SIZE, 0))
    image.paste((255, 0, 0, 255), (0, 0, 32, 64))
    image.convert(mode).save(folder / "clear.png")
    pixels = np.asarray(load_image(folder / "clear.png"))
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:, 40:] == 255).all()
    assert (pixels[:, :20] != 255).any()
    _, warnings = check_run(train_data_dir=str(folder.parent))
    assert any("transparent, laid on white" in text for text in warnings)


KINDS: list[tuple[str, Callable[[], Image.Image], tuple[int, int, int]]] = [
    ("16-bit", lambda: Image.fromarray(np.full((64, 64), 32_896, np.uint16)), (128, 128, 128)),
    ("grey", lambda: Image.new("L", SIZE, 77), (77, 77, 77)),
    ("palette", lambda: Image.new("RGB", SIZE, (10, 200, 30)).quantize(4), (10, 200, 30)),
    ("one-bit", lambda: Image.new("1", SIZE, 1), (255, 255, 255)),
    ("CMYK", lambda: Image.new("CMYK", SIZE, (0, 255, 255, 0)), (254, 0, 0)),
]


@pytest.mark.parametrize(("make", "colour"), [pytest.param(*k[1:], id=f"08-{k[0]}") for k in KINDS])
def test_every_kind_of_pixel_becomes_eight_bit_rgb(
    folder: Path, check_run: CheckRun, make: Callable[[], Image.Image], colour: tuple[int, ...]
) -> None:
    image = make()
    path = folder / ("x.jpg" if image.mode == "CMYK" else "x.png")
    image.save(path)
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    assert np.abs(np.asarray(loaded).astype(int) - colour).max() <= 2
    assert check_run(train_data_dir=str(folder.parent))[0] == []


def test_10_a_long_narrow_image_is_told_with_what_is_cut(folder: Path, check_run: CheckRun) -> None:
    picture((64, 1280)).save(folder / "tower.png")
    _, warnings = check_run(train_data_dir=str(folder.parent), enable_bucket=None)
    (told,) = [text for text in warnings if "tower.png" in text and "cut off" in text]
    assert "tower.png (64x1280, 95% cut off)" in told


def test_12_one_name_with_two_endings_is_told(folder: Path, check_run: CheckRun) -> None:
    picture().save(folder / "good.jpg")
    _, warnings = check_run(train_data_dir=str(folder.parent))
    assert any("the same name as another image, and so the same caption" in w for w in warnings)


NAMES = ["a.b.c.png", "two words.png", "猫と犬.png", "😀.png", "x" * 246 + ".png", "-x.png"]


def test_13_odd_names_are_trained(folder: Path, train_lora: TrainLora) -> None:
    for name in NAMES:
        picture().save(folder / name)
        folder.joinpath(name).with_suffix(".txt").write_text("a cat", encoding="utf-8")
    run = train_lora(train_data_dir=str(folder.parent), max_train_steps=4, max_train_epochs=1)
    keys = {key for step in run.steps for key in step["keys"]}
    assert keys == {f"1_cat/{name}" for name in [*NAMES, "good.png"]}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no such files")
def test_14_links_to_nowhere_and_what_is_no_file_are_told_without_waiting(
    folder: Path, check_run: CheckRun
) -> None:
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    problems, _ = check_run(train_data_dir=str(folder.parent))
    told = {Path(problem.split(": ")[0]).name: problem for problem in problems}
    assert set(told) == {"loop.png", "gone.png", "pipe.png"}
    assert "cannot be read" in told["gone.png"]
    assert "not a regular file" in told["pipe.png"]
    assert check_run(train_data_dir=str(folder.parent), on_bad_image="skip")[0] == []


def test_15_hidden_files_and_folders_within_are_listed_as_left_out(
    folder: Path, options: MakeOptions
) -> None:
    (folder / "._good.png").write_bytes(b"resource fork")
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "deeper").mkdir()
    picture().save(folder / "deeper" / "b.png")
    plan = sdxl_train.plan(options(train_data_dir=str(folder.parent)))
    left_out = {Path(item["path"]).name: item["reason"] for item in plan.dataset["skipped"]}
    assert left_out.keys() == {"._good.png", "Thumbs.db", ".ipynb_checkpoints", "deeper"}
    assert left_out["._good.png"] == left_out[".ipynb_checkpoints"] == "hidden"
    assert plan.dataset["images"] == 1


def test_16_copies_are_told(folder: Path, check_run: CheckRun) -> None:
    (folder / "copy.png").write_bytes((folder / "good.png").read_bytes())
    _, warnings = check_run(train_data_dir=str(folder.parent))
    assert any(
        text.startswith("1 image is a copy of another") and "copy.png" in text for text in warnings
    )


def test_17_masks_are_made_to_fit_and_missing_ones_stop_the_run(
    folder: Path, check_run: CheckRun
) -> None:
    masks = folder.parent / "masks"
    masks.mkdir()
    chosen = {
        "train_data_dir": str(folder.parent),
        "conditioning_data_dir": str(masks),
        "masked_loss": True,
    }
    (problem,), _ = check_run(**chosen)
    assert "1 of 1 images" in problem
    assert "good.png" in problem
    picture((32, 48)).save(masks / "good.png")
    problems, warnings = check_run(**chosen)
    assert problems == []
    assert any("a mask of another size than its image, resized" in text for text in warnings)
    assert any("a mask in colour, its red channel counts" in text for text in warnings)
    (masks / "good.png").write_bytes(b"")
    (problem,), _ = check_run(**chosen)
    assert problem.startswith(f"{masks / 'good.png'}: is empty")


REMOVER = """
from pathlib import Path
from sdxl_train import hookimpl

@hookimpl
def run_started(run):
    path = Path({path!r})
    {action}
"""


@pytest.mark.parametrize("action", ["path.unlink()", "path.write_bytes(b'')"])
def test_18_an_image_that_goes_while_it_is_trained_is_named(
    folder: Path, train_lora: TrainLora, tmp_path: Path, action: str
) -> None:
    plugin = tmp_path / "remover.py"
    plugin.write_text(REMOVER.format(path=str(folder / "good.png"), action=action))
    chosen = {"train_data_dir": str(folder.parent), "plugin": [str(plugin)], "max_train_steps": 2}
    with pytest.raises(TrainingError, match=r"good\.png"):
        train_lora(**chosen)


def test_18_cached_latents_do_not_need_the_image_any_more(
    folder: Path, train_lora: TrainLora, tmp_path: Path, recorder: Path
) -> None:
    plugin = tmp_path / "remover.py"
    plugin.write_text(REMOVER.format(path=str(folder / "good.png"), action="path.unlink()"))
    run = train_lora(
        train_data_dir=str(folder.parent),
        plugin=[str(plugin), str(recorder)],
        cache_latents=True,
        max_train_steps=2,
    )
    assert [step["step"] for step in run.steps] == [1, 2]
