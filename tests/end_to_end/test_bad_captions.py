"""Bad captions, by the numbers of the catalogue of bad inputs. Every case is a real file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

import sdxl_train
from sdxl_train.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import CheckRun, MakeOptions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two images, one of them with a caption."""
    folder = tmp_path / "1_cat"
    folder.mkdir()
    for name, shade in (("a", 10), ("b", 20)):
        Image.new("RGB", (64, 64), (shade, 100, 200)).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("a cat", encoding="utf-8")
    (folder / "b.txt").write_text("a dog", encoding="utf-8")
    return folder


def trained(options: MakeOptions, folder: Path, **changes: Any) -> dict[str, str]:
    """Give the caption that each image is trained with."""
    from sdxl_train.preflight import prepare
    from sdxl_train.settings import from_mapping

    batches = prepare(from_mapping(options(train_data_dir=str(folder.parent), **changes))).batches
    captions: dict[str, str] = {}
    for spec in batches.epoch(1):
        images = batches.datasets[spec.dataset].images
        keys = [images[sample.image].path.stem for sample in spec.samples]
        captions |= dict(zip(keys, batches.captions(spec), strict=True))
    return captions


def test_19_captions_under_another_ending_are_asked_for(folder: Path, check_run: CheckRun) -> None:
    for path in folder.glob("*.txt"):
        path.rename(path.with_suffix(".tags"))
    (problem,), _ = check_run(train_data_dir=str(folder.parent))
    assert problem.startswith("option 'caption_extension'") or "caption_extension" in problem
    assert "no image in" in problem
    assert "use --caption_extension .tags" in problem
    assert check_run(train_data_dir=str(folder.parent), caption_extension=".tags")[0] == []


def test_20_some_without_a_caption_are_counted_or_refused(
    folder: Path, check_run: CheckRun
) -> None:
    (folder / "b.txt").unlink()
    _, warnings = check_run(train_data_dir=str(folder.parent))
    assert any(
        "1 of 2 images have no caption file; their caption is the class tokens 'cat'" in text
        for text in warnings
    )
    (problem,), _ = check_run(train_data_dir=str(folder.parent), strict_captions=True)
    assert problem.startswith(f"{folder / 'b.png'}: has no caption")


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n "], ids=["21-empty", "21-blank"])
def test_an_empty_file_is_an_empty_caption(
    folder: Path, options: MakeOptions, check_run: CheckRun, content: bytes
) -> None:
    (folder / "b.txt").write_bytes(content)
    _, warnings = check_run(train_data_dir=str(folder.parent))
    assert f"1 file: caption empty: {folder / 'b.txt'}" in warnings
    assert trained(options, folder)["b"] == ""
    (problem,), _ = check_run(train_data_dir=str(folder.parent), strict_captions=True)
    assert problem.startswith(f"{folder / 'b.txt'}: caption empty")


ENCODINGS = [
    pytest.param("café à Paris", "cp1252", id="22-cp1252"),
    pytest.param("猫猫, 白色", "gbk", id="22-gbk"),
    pytest.param("naïve, 猫", "utf-16", id="22-utf-16"),
]


@pytest.mark.parametrize(("text", "encoding"), ENCODINGS)
def test_other_encodings_are_recognized_or_refused(
    folder: Path, options: MakeOptions, check_run: CheckRun, text: str, encoding: str
) -> None:
    (folder / "b.txt").write_bytes(text.encode(encoding))
    _, warnings = check_run(train_data_dir=str(folder.parent))
    (told,) = [line for line in warnings if "not UTF-8, read as" in line]
    assert str(folder / "b.txt") in told
    assert trained(options, folder)["b"] == text
    (problem,), _ = check_run(train_data_dir=str(folder.parent), strict_captions=True)
    assert problem.startswith(f"{folder / 'b.txt'}: caption not UTF-8")


def test_22_bytes_that_are_no_text_stop_the_run(folder: Path, check_run: CheckRun) -> None:
    (folder / "b.txt").write_bytes(b"\xff\xfe\x00")
    (problem,), _ = check_run(train_data_dir=str(folder.parent))
    assert problem.startswith(f"{folder / 'b.txt'}: ")
    assert "save it as UTF-8" in problem


MENDED = [
    pytest.param("\ufeffa cat".encode(), "a cat", id="23-byte-order-mark"),
    pytest.param(b"a cat,\ttabby\r\n", "a cat, tabby", id="24-tab-and-crlf"),
    pytest.param("a\u00a0cat, b".encode(), "a cat, b", id="24-no-break-space"),
    pytest.param(b"a cat,, ,tabby,", "a cat,tabby", id="24-double-and-trailing-commas"),
]


@pytest.mark.parametrize(("content", "caption"), MENDED)
def test_what_means_nothing_is_taken_out(
    folder: Path, options: MakeOptions, content: bytes, caption: str
) -> None:
    (folder / "b.txt").write_bytes(content)
    assert trained(options, folder)["b"] == caption
    shuffled = trained(options, folder, shuffle_caption=True)["b"]
    assert "" not in shuffled.split(", ")


def test_25_further_lines_are_told_or_drawn(
    folder: Path, options: MakeOptions, check_run: CheckRun
) -> None:
    (folder / "b.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    _, warnings = check_run(train_data_dir=str(folder.parent))
    assert any(
        "more than one line, only the first is used (enable_wildcard)" in w for w in warnings
    )
    assert trained(options, folder)["b"] == "one"
    assert trained(options, folder, enable_wildcard=True)["b"] in ("one", "two")


def test_26_captions_over_the_limit_are_counted(folder: Path, options: MakeOptions) -> None:
    (folder / "b.txt").write_text(" ".join(["cat"] * 412), encoding="utf-8")
    plan = sdxl_train.plan(options(train_data_dir=str(folder.parent), max_token_length=225))
    (told,) = [text for text in plan.warnings if "are cut after" in text]
    assert told.startswith("1 of 2 captions are cut after 225 tokens; the longest has 412")


def test_27_tags_that_cannot_be_kept_are_told(folder: Path, check_run: CheckRun) -> None:
    changes = {"shuffle_caption": True, "keep_tokens": 5, "keep_tokens_separator": "|||"}
    problems, warnings = check_run(train_data_dir=str(folder.parent), **changes)
    assert problems == []
    assert any("keep_tokens 5: 2 of 2 captions have fewer tags" in text for text in warnings)
    assert any("keep_tokens_separator '|||' is not in 2 of 2" in text for text in warnings)


@pytest.mark.parametrize(
    ("caption", "place"),
    [("a {red|blue cat", "1:3"), ("x\ny} z", "2:2"), ("{a {b|c} d}", "1:4")],
    ids=["28-open", "28-close", "28-nested"],
)
def test_unbalanced_wildcards_are_told_with_their_column(
    folder: Path, check_run: CheckRun, caption: str, place: str
) -> None:
    (folder / "b.txt").write_text(caption, encoding="utf-8")
    assert check_run(train_data_dir=str(folder.parent))[0] == []
    (problem,), _ = check_run(train_data_dir=str(folder.parent), enable_wildcard=True)
    assert problem.startswith(f"{folder / 'b.txt'}:{place}: ")


def test_29_brackets_are_letters(folder: Path, options: MakeOptions) -> None:
    caption = r"(masterpiece:1.2), [x], \(y\), (open"
    (folder / "b.txt").write_text(caption, encoding="utf-8")
    assert trained(options, folder)["b"] == caption
    assert trained(options, folder, weighted_captions=True)["b"] == caption


def test_30_a_caption_of_a_megabyte_stops_the_run(folder: Path, check_run: CheckRun) -> None:
    (folder / "b.txt").write_bytes(b"word " * 200_000)
    (problem,), _ = check_run(train_data_dir=str(folder.parent))
    assert problem.startswith(f"{folder / 'b.txt'}: has 1,000,000 bytes")


def test_31_the_dot_of_the_ending_is_added(folder: Path, options: MakeOptions) -> None:
    for path in folder.glob("*.txt"):
        path.rename(path.with_suffix(".tags"))
    assert trained(options, folder, caption_extension="tags")["b"] == "a dog"


def test_the_command_tells_all_at_once_without_a_traceback(
    folder: Path, options: MakeOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "b.txt").write_bytes(b"x" * 1_000_000)
    chosen = options(train_data_dir=str(folder.parent), plugin=None)
    words = [word for key, value in chosen.items() for word in (f"--{key}", str(value))]
    assert main(["plan", *words]) == 2
    told = capsys.readouterr().err
    assert "2 problems, nothing was started" in told
    assert "Traceback" not in told
