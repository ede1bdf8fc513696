"""Bad dataset files and folders, by the numbers of the catalogue of bad inputs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from sdxl_train.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import CheckRun, MakeOptions


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    """A folder of one image with a caption, the current folder's and the file's neighbour."""
    folder = tmp_path / "cats"
    folder.mkdir()
    Image.new("RGB", (64, 64), (10, 100, 200)).save(folder / "a.png")
    (folder / "a.txt").write_text("a cat", encoding="utf-8")
    return folder


GOOD = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cats'\n"

WRONG: list[tuple[str, str, tuple[str, ...]]] = [
    ("32-syntax", GOOD + "num_repeats = = 2\n", (":4:", "num_repeats = = 2")),
    (
        "33-backslash",
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\Users\\me"\n',
        (":3:", "'single quotes' or with /"),
    ),
    ("35-unknown-key", GOOD + "flip_augg = true\n", (":4:", "did you mean flip_aug?")),
    ("36-wrong-table", GOOD + "batch_size = 2\n", (":4:", "it belongs in [[datasets]]")),
    ("36-of-the-run", "seed = 1\n" + GOOD, (":1:", "seed", "not a key of this table")),
    ("37-text-for-number", GOOD + 'num_repeats = "2"\n', (":4:", "'2' is not a whole number")),
    ("37-true-for-number", GOOD + "keep_tokens = true\n", (":4:", "keep_tokens")),
    ("37-number-for-bool", GOOD + "flip_aug = 1\n", (":4:", "1 is not true or false")),
    ("37-list-for-number", GOOD + "num_repeats = [2]\n", (":4:", "num_repeats")),
    ("38-key-twice", GOOD + "num_repeats = 1\nnum_repeats = 2\n", (":5:",)),
    ("39-dropout", GOOD + "caption_dropout_rate = 1.5\n", (":4:", "1.5", ">= 0 and <= 1")),
    ("39-repeats", GOOD + "num_repeats = -1\n", (":4:", "-1", ">= 1")),
    ("39-batch", "[general]\nbatch_size = 0\n" + GOOD, (":2:", "0", ">= 1")),
    ("39-nan", GOOD + "caption_dropout_rate = nan\n", (":4:", "caption_dropout_rate")),
    ("39-split", "[general]\nvalidation_split = 2.0\n" + GOOD, (":2:", "validation_split")),
    ("41-no-datasets", "datasets = []\n", ("datasets: is empty",)),
    ("41-nothing", "", ("add [[datasets]]",)),
    ("41-no-subsets", "[[datasets]]\nsubsets = []\n", ("is empty",)),
    ("43-missing", GOOD.replace("cats", "cast"), (":3:", "did you mean", "cats")),
    ("43-file", GOOD.replace("cats", "cats/a.png"), (":3:", "is a file, not a folder")),
    ("45-multiple", "[general]\nresolution = 100\n" + GOOD, (":2:", "multiples of 32", "96,96")),
    (
        "45-bucket-steps",
        "[general]\nenable_bucket = true\nbucket_reso_steps = 40\n" + GOOD,
        (":3:", "40 is not a multiple of 32", "use 32"),
    ),
    (
        "45-limits",
        "[general]\nenable_bucket = true\nmin_bucket_reso = 512\nmax_bucket_reso = 32\n" + GOOD,
        (":3:", "min_bucket_reso", "512", "use at most 64"),
    ),
    ("47-schema-version", "schema_version = 99\n" + GOOD, (":1: schema_version", "not a key")),
]


@pytest.mark.parametrize(("text", "expected"), [pytest.param(*w[1:], id=w[0]) for w in WRONG])
def test_a_mistake_is_told_with_its_line_and_remedy(
    cats: Path,
    check_run: CheckRun,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    expected: tuple[str, ...],
) -> None:
    monkeypatch.chdir(cats.parent)
    path = cats.parent / "data.toml"
    path.write_text(text, encoding="utf-8")
    changes: dict[str, Any] = {"enable_bucket": None, "bucket_no_upscale": None}
    changes |= {"bucket_reso_steps": None, "train_data_dir": None, "dataset_config": str(path)}
    problems, _ = check_run(**changes)
    told = "\n".join(problems)
    assert told.startswith(str(path))
    for part in expected:
        assert part in told


@pytest.mark.parametrize("encoding", ["utf-16", "cp1251"], ids=["34-utf-16", "34-cp1251"])
def test_a_file_in_another_encoding_is_told(cats: Path, check_run: CheckRun, encoding: str) -> None:
    path = cats.parent / "data.toml"
    path.write_bytes(f"# коты\n{GOOD}".encode(encoding))
    (problem,), _ = check_run(train_data_dir=None, dataset_config=str(path))
    assert str(path) in problem
    assert "save it as UTF-8" in problem


def test_all_mistakes_are_told_at_once_with_exit_code_2(
    cats: Path, options: MakeOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt key, a size that is none, a folder that is not there: the three of one file."""
    path = cats.parent / "data.toml"
    text = '[general]\nresolution = "big"\nshufle_caption = true\n[[datasets]]\n'
    path.write_text(f"{text}[[datasets.subsets]]\nnum_repeats = 2\n", encoding="utf-8")
    chosen = options(train_data_dir=None, dataset_config=str(path), plugin=None)
    words = [word for key, value in chosen.items() for word in (f"--{key}", str(value))]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert f"{path}:2: general.resolution: 'big' is not a resolution" in told
    assert "did you mean shuffle_caption?" in told
    assert "image_dir: is required" in told
    assert "Traceback" not in told


def test_41_a_folder_without_images_is_told_with_what_it_holds(
    cats: Path, check_run: CheckRun
) -> None:
    (cats / "a.png").rename(cats / "a.gif")
    path = cats.parent / "data.toml"
    path.write_text(GOOD, encoding="utf-8")
    (problem,), _ = check_run(train_data_dir=None, dataset_config=str(path))
    assert "holds no images (1 x " in problem
    assert "image type .gif is not supported" in problem


def test_of_many_folders_the_plan_prints_some(
    tmp_path: Path, tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(23):
        folder = tmp_path / "data" / f"1_{number:02}"
        folder.mkdir(parents=True)
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / "a.png")
    words = [f"--train_data_dir={tmp_path / 'data'}", f"--output_dir={tmp_path / 'out'}"]
    words += ["--resolution=64", "--network_module=networks.lora", "--max_train_steps=1"]
    assert main(["plan", f"--pretrained_model_name_or_path={tiny_file}", *words]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'data' / '1_19'}: 1 image, " in printed
    assert "1_20" not in printed
    assert "and 3 more folders: 3 images (--json tells of each)" in printed


def test_42_a_folder_named_twice_is_used_once(cats: Path, check_run: CheckRun) -> None:
    path = cats.parent / "data.toml"
    path.write_text(GOOD + "[[datasets.subsets]]\nimage_dir = 'cats'\n", encoding="utf-8")
    _, warnings = check_run(train_data_dir=None, dataset_config=str(path))
    assert any("is named twice in this dataset; it is used once" in text for text in warnings)


def test_43_the_wrong_level_of_folders_is_told(cats: Path, check_run: CheckRun) -> None:
    path = cats.parent / "data.toml"
    path.write_text(GOOD.replace("'cats'", f"'{cats.parent}'"), encoding="utf-8")
    (problem,), _ = check_run(train_data_dir=None, dataset_config=str(path))
    assert f"images lie one level deeper: name {cats}" in problem
    leaf = cats.rename(cats.with_name("3_cats"))
    (problem,), _ = check_run(train_data_dir=str(leaf))
    assert f"give the folder above it: {leaf.parent}" in problem


FROZEN = [
    ("44-latents-and-crop", "random_crop = true", {"cache_latents": True}),
    ("44-latents-and-colour", "color_aug = true", {"cache_latents": True}),
    ("44-text-and-shuffle", "shuffle_caption = true", {"cache_text_encoder_outputs": True}),
    ("44-text-and-warm-up", "token_warmup_step = 5", {"cache_text_encoder_outputs": True}),
    (
        "44-text-and-dropped-tags",
        "caption_tag_dropout_rate = 0.1",
        {"cache_text_encoder_outputs": True},
    ),
]


@pytest.mark.parametrize(("line", "cache"), [pytest.param(*f[1:], id=f[0]) for f in FROZEN])
def test_what_a_cache_would_freeze_is_refused_with_both_places(
    cats: Path, check_run: CheckRun, line: str, cache: dict[str, bool]
) -> None:
    path = cats.parent / "data.toml"
    path.write_text(f"{GOOD}{line}\n", encoding="utf-8")
    changes = {"train_data_dir": None, "dataset_config": str(path), **cache}
    (problem,), _ = check_run(network_train_unet_only=True, **changes)
    assert problem.startswith(f"{path}:4: ")
    assert line.split(" ")[0] in problem
    assert next(iter(cache)) in problem


def test_48_and_49_home_variables_and_the_files_own_folder_are_known(
    cats: Path, check_run: CheckRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cats.parent / "data.toml"
    monkeypatch.setenv("HOME", str(cats.parent))
    monkeypatch.setenv("USERPROFILE", str(cats.parent))
    monkeypatch.setenv("CATS", str(cats))
    # The current folder has no such folder; the file's own does.
    for name in ("~/cats", "$CATS", "cats"):
        path.write_text(GOOD.replace("'cats'", f"'{name}'"), encoding="utf-8")
        assert check_run(train_data_dir=None, dataset_config=str(path))[0] == [], name


def test_json_says_the_same(cats: Path, check_run: CheckRun) -> None:
    path = cats.parent / "data.json"
    document = {"datasets": [{"subsets": [{"image_dir": str(cats), "flip_augg": 1}]}]}
    path.write_text(json.dumps(document), encoding="utf-8")
    (problem,), _ = check_run(train_data_dir=None, dataset_config=str(path))
    assert "datasets[0].subsets[0].flip_augg" in problem
    assert "did you mean flip_aug?" in problem
    for text in ("[]", "3", '{"datasets": [1]}', '{"datasets": {"subsets": 2}}'):
        path.write_text(text, encoding="utf-8")
        problems, _ = check_run(train_data_dir=None, dataset_config=str(path))
        assert problems
        assert problems[0].startswith(str(path)), text
