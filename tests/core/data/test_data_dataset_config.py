"""What to train on: the fallback of values, their origins, and every mistake in a dataset file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from sdxl_train.data.dataset_config import DatasetConfig, DatasetOptions, resolve_datasets

if TYPE_CHECKING:
    from tests.core.data.conftest import MakeImage


def place(name: str) -> str:
    return f"--{name}"


def resolve(**options: Any) -> tuple[list[DatasetConfig], list[str], list[str]]:
    configs, problems, warnings = resolve_datasets(DatasetOptions(**options), place)
    return configs, [str(problem) for problem in problems], warnings


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "data.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(tmp_path: Path, text: str, **options: Any) -> list[str]:
    return resolve(dataset_config=toml(tmp_path, text), **{"resolution": 64} | options)[1]


@pytest.fixture
def cats(tmp_path: Path, make_image: MakeImage) -> Path:
    make_image(tmp_path / "cats" / "a.png", caption="a cat")
    return tmp_path / "cats"


# ------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ("1024", (1024, 1024)),
        ("1024,768", (1024, 768)),
        (" 1024, 768 ", (1024, 768)),
        (512, (512, 512)),
        ([640, 512], (640, 512)),
        (["640", "512"], (640, 512)),
        (["640,512"], (640, 512)),
    ],
)
def test_resolution_is_one_side_or_width_and_height(given: Any, size: tuple[int, int]) -> None:
    assert DatasetOptions(resolution=given).resolution == size


@pytest.mark.parametrize("given", ["big", "1024x768", "1,2,3", "0", "-5", 1.5, True, "", []])
def test_other_resolutions_are_refused(given: Any) -> None:
    with pytest.raises(ValidationError, match="write 1024 or 1024,768"):
        DatasetOptions(resolution=given)


def test_the_dot_of_the_caption_extension_is_added() -> None:
    assert DatasetOptions(caption_extension="txt").caption_extension == ".txt"


@pytest.mark.parametrize(
    "options",
    [
        {"train_batch_size": 0},
        {"caption_dropout_rate": 1.5},
        {"caption_tag_dropout_rate": -0.1},
        {"keep_tokens": -1},
        {"prior_loss_weight": -1.0},
        {"vae_batch_size": 0},
        {"caption_separator": ""},
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DatasetOptions(**options)


def test_defaults_are_those_of_sd_scripts() -> None:
    options = DatasetOptions()
    assert options.caption_extension == ".caption"
    assert (options.min_bucket_reso, options.max_bucket_reso) == (256, 1024)
    assert (options.bucket_reso_steps, options.train_batch_size) == (64, 1)
    assert (options.max_data_loader_n_workers, options.vae_batch_size) == (8, 1)
    assert all(field.description for field in DatasetOptions.model_fields.values())


# --------------------------------------------------------------------------- fallback and origin


def test_values_fall_back_from_subset_to_default(tmp_path: Path, cats: Path) -> None:
    path = toml(
        tmp_path,
        f"""[general]
shuffle_caption = true
resolution = 128

[[datasets]]
resolution = [96, 64]
keep_tokens = 2

[[datasets.subsets]]
image_dir = '{cats}'
num_repeats = 3
shuffle_caption = false
""",
    )
    (dataset,), problems, _ = resolve(
        dataset_config=path, resolution=32, train_batch_size=4, keep_tokens=7, flip_aug=True
    )
    assert problems == []
    (subset,) = dataset.subsets
    assert dataset.resolution == (96, 64)
    assert dataset.origins["resolution"] == f"{path}:6: datasets[0].resolution"
    assert (dataset.batch_size, dataset.origins["batch_size"]) == (4, "--train_batch_size")
    assert subset.num_repeats == 3
    assert subset.origins["num_repeats"] == f"{path}:11: datasets[0].subsets[0].num_repeats"
    assert subset.captions.shuffle_caption is False
    assert subset.captions.keep_tokens == 2
    assert (subset.views.flip_aug, subset.origins["flip_aug"]) == (True, "--flip_aug")
    assert subset.origins["caption_prefix"] == "default"
    assert subset.captions.caption_prefix == ""


def test_general_values_have_their_own_origin(tmp_path: Path, cats: Path) -> None:
    path = toml(
        tmp_path,
        f"""[general]
caption_extension = "tags"
batch_size = 2
[[datasets]]
[[datasets.subsets]]
image_dir = '{cats}'
""",
    )
    (dataset,), _, _ = resolve(dataset_config=path, resolution="64")
    assert dataset.batch_size == 2
    assert dataset.origins["batch_size"] == f"{path}:3: general.batch_size"
    assert dataset.subsets[0].caption_extensions == (".tags",)


def test_caption_then_txt_are_looked_for_only_by_default(cats: Path) -> None:
    (dataset,), _, _ = resolve(train_data_dir=cats, resolution=64)
    assert dataset.subsets[0].caption_extensions == (".caption", ".txt")
    (dataset,), _, _ = resolve(train_data_dir=cats, resolution=64, caption_extension=".caption")
    assert dataset.subsets[0].caption_extensions == (".caption",)


def test_json_means_the_same_as_toml(tmp_path: Path, cats: Path) -> None:
    document = {"datasets": [{"subsets": [{"image_dir": str(cats), "num_repeats": 2}]}]}
    path = tmp_path / "data.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(document).encode())
    (dataset,), problems, _ = resolve(dataset_config=path, resolution=64)
    assert problems == []
    assert dataset.subsets[0].num_repeats == 2


# ----------------------------------------------------------------------------------- folders


def test_numbered_folders_say_repeats_and_class_tokens(
    tmp_path: Path, make_image: MakeImage
) -> None:
    for name in ("10_black cat", "2_dog_big", "0_off", "misc", ".hidden"):
        make_image(tmp_path / "train" / name / "a.png")
    make_image(tmp_path / "train" / "loose.png")
    make_image(tmp_path / "reg" / "1_cat" / "a.png")
    (dataset,), problems, warnings = resolve(
        train_data_dir=tmp_path / "train", reg_data_dir=tmp_path / "reg", resolution=64
    )
    assert problems == []
    found = [(s.source.name, s.num_repeats, s.class_tokens, s.is_reg) for s in dataset.subsets]
    assert found == [
        ("10_black cat", 10, "black cat", False),
        ("2_dog_big", 2, "dog_big", False),
        ("1_cat", 1, "cat", True),
    ]
    text = "\n".join(warnings)
    assert "0_off: left out, its name says 0 repeats" in text
    assert "left out beside the N_name folders: 1 image" in text
    assert "misc (1 image)" in text
    origin = dataset.subsets[0].origins["num_repeats"]
    assert origin == "the name of folder 10_black cat"


def test_a_flat_folder_is_taken_and_that_is_said(cats: Path) -> None:
    (dataset,), problems, warnings = resolve(train_data_dir=cats, resolution=64, dataset_repeats=5)
    assert problems == []
    assert (dataset.subsets[0].image_dir, dataset.subsets[0].num_repeats) == (cats, 5)
    assert warnings[0].endswith("what it holds itself is taken, 1 image")


def test_idle_dataset_repeats_are_said(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "10_cat" / "a.png")
    _, problems, warnings = resolve(train_data_dir=tmp_path, resolution=64, dataset_repeats=0)
    assert problems == []
    assert "--dataset_repeats: no effect" in warnings[0]


def test_wrong_layouts_name_the_nearest_right_one(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "project" / "img" / "10_cat" / "a.png")
    make_image(tmp_path / "names" / "cat" / "a.png")
    (tmp_path / "empty").mkdir()
    leaf = tmp_path / "project" / "img" / "10_cat"
    cases = {
        leaf: f"give the folder above it: {leaf.parent}",
        tmp_path / "project": f"did you mean {tmp_path / 'project' / 'img'}?",
        tmp_path / "names": "put the number of repeats before the name: 1_cat",
        tmp_path / "empty": "put the images into a folder 1_name inside it",
        tmp_path / "projekt": f"did you mean {tmp_path / 'project'}?",
        leaf / "a.png": f"did you mean {leaf}?",
    }
    for path, remedy in cases.items():
        _, problems, _ = resolve(train_data_dir=path, resolution=64)
        assert len(problems) == 1
        assert problems[0].startswith("--train_data_dir: ")
        assert problems[0].endswith(remedy)


def test_naming_nothing_is_a_problem() -> None:
    _, (problem,), _ = resolve()
    assert "give --train_data_dir" in problem
    _, (problem,), _ = resolve(reg_data_dir=Path("/nowhere/reg"), dataset_config=Path("x.toml"))
    assert problem.startswith("--dataset_config: given together with --reg_data_dir")


def test_regularization_alone_is_a_problem(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "1_cat" / "a.png")
    _, problems, _ = resolve(reg_data_dir=tmp_path, resolution=64)
    assert "nothing to train" in problems[0]


def test_a_missing_resolution_is_a_problem(cats: Path) -> None:
    _, (problem,), _ = resolve(train_data_dir=cats)
    assert problem.startswith("--resolution: is required")


# ------------------------------------------------------------------------- mistakes in the file


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path, cats: Path) -> None:
    problems = problems_of(
        tmp_path,
        f"""resolution = 64
[general]
flip_augg = true
image_dir = "x"
[[datasets]]
train_batch_size = 2
seed = 1
cache_latents = true
[[datasets.subsets]]
image_dir = '{cats}'
num_repeats = "3"
enable_bucket = true
shuffle_caption = 1
caption_dropout_rate = 1.5
[[datasets.subsets]]
num_repeats = -1
""",
    )
    path = tmp_path / "data.toml"
    told = {problem.split(": ", 2)[1]: problem for problem in problems}
    assert set(told) == {
        "resolution",
        "general.flip_augg",
        "general.image_dir",
        "datasets[0].train_batch_size",
        "datasets[0].seed",
        "datasets[0].cache_latents",
        "datasets[0].subsets[0].num_repeats",
        "datasets[0].subsets[0].enable_bucket",
        "datasets[0].subsets[0].shuffle_caption",
        "datasets[0].subsets[0].caption_dropout_rate",
        "datasets[0].subsets[1].num_repeats",
        "datasets[0].subsets[1].image_dir",
    }
    remedies = {
        "resolution": "it belongs in [[datasets]] or [general]",
        "general.flip_augg": "did you mean flip_aug?",
        "general.image_dir": "it belongs in [[datasets.subsets]]",
        "datasets[0].train_batch_size": "in this file it is called batch_size",
        "datasets[0].cache_latents": "set it for the whole run: --cache_latents",
        "datasets[0].subsets[0].num_repeats": "'3' is not a whole number >= 1",
        "datasets[0].subsets[0].enable_bucket": "it belongs in [[datasets]] or [general]",
        "datasets[0].subsets[0].shuffle_caption": "1 is not true or false",
        "datasets[0].subsets[0].caption_dropout_rate": "1.5 is not a number >= 0 and <= 1",
        "datasets[0].subsets[1].image_dir": "set image_dir, or metadata_file",
    }
    for key, remedy in remedies.items():
        assert told[key].endswith(remedy), told[key]
    assert told["datasets[0].subsets[0].num_repeats"].startswith(f"{path}:11: ")
    assert told["datasets[0].subsets[1].image_dir"].startswith(f"{path}:15: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "add [[datasets]]"),
        ("datasets = []", "is empty"),
        ("[[datasets]]\n", "has no subsets"),
        ("[[datasets]]\nsubsets = []\n", "add an entry to [[datasets.subsets]]"),
        ("[datasets]\n", "write [[datasets]] with two brackets"),
    ],
)
def test_a_file_without_datasets_or_subsets_says_what_to_add(
    tmp_path: Path, text: str, expected: str
) -> None:
    (problem,) = problems_of(tmp_path, text)
    assert expected in problem


@pytest.mark.parametrize(
    ("data", "where", "hint"),
    [
        (b"[[datasets]]\nbatch_size = \n", ":2:14", ""),
        (b'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\Users\\me"\n', ":3:", "'single"),
        ("[[datasets]]\n".encode("utf-16"), "", "save it as UTF-8"),
        ("[[datasets]]\n# данные\n".encode("cp1251"), ":2", "save it as UTF-8"),
        (b"[general]\nkeep_tokens = 1\nkeep_tokens = 2\n", ":3:", ""),
    ],
)
def test_broken_toml_is_told_by_line(tmp_path: Path, data: bytes, where: str, hint: str) -> None:
    path = tmp_path / "data.toml"
    path.write_bytes(data)
    _, (problem,), _ = resolve(dataset_config=path, resolution=64)
    assert problem.startswith(f"{path}{where}")
    assert hint in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [('{"datasets": [}', ":1:15"), ('{"general": {}, "general": {}}', "general occurs twice")],
)
def test_broken_json_is_told(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    _, (problem,), _ = resolve(dataset_config=path, resolution=64)
    assert expected in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"datasets": []}', 'add an entry to "datasets"'),
        ('{"datasets": 1}', 'write "datasets": [{...}]'),
        ('{"datasets": [{"image_dir": "x"}]}', 'it belongs in "subsets"'),
    ],
)
def test_remedies_for_json_are_in_its_own_words(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    _, problems, _ = resolve(dataset_config=path, resolution=64)
    assert any(problem.endswith(f"-> {expected}") for problem in problems)


def test_a_byte_order_mark_is_fine(tmp_path: Path, cats: Path) -> None:
    path = tmp_path / "data.toml"
    text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{cats}'\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (dataset,), problems, _ = resolve(dataset_config=path)
    assert problems == []
    assert dataset.resolution == (64, 64)


def test_the_file_itself_may_be_missing_or_of_another_type(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("", encoding="utf-8")
    (tmp_path / "data.toml").write_text("", encoding="utf-8")
    cases = {
        "dataa.toml": f"did you mean {tmp_path / 'data.toml'}?",
        "data.yaml": "is neither .toml nor .json",
        "": "use --train_data_dir for a folder",
    }
    for name, expected in cases.items():
        _, (problem,), _ = resolve(dataset_config=tmp_path / name, resolution=64)
        assert expected in problem


def test_folders_of_a_file_that_cannot_be_used_are_told(tmp_path: Path, cats: Path) -> None:
    problems = problems_of(
        tmp_path,
        f"""[[datasets]]
[[datasets.subsets]]
image_dir = '{tmp_path / "cat"}'
[[datasets.subsets]]
image_dir = '{cats / "a.png"}'
""",
    )
    place = f"{tmp_path / 'data.toml'}:3: datasets[0].subsets[0].image_dir: "
    assert problems[0].startswith(place)
    assert problems[0].endswith(f"did you mean {cats}?")
    assert problems[1].endswith(f"did you mean {cats}?")


def test_relative_folders_are_found_from_here_then_from_the_file(
    tmp_path: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image(tmp_path / "here" / "both" / "a.png")
    make_image(tmp_path / "file" / "both" / "a.png")
    make_image(tmp_path / "file" / "only" / "a.png")
    monkeypatch.chdir(tmp_path / "here")
    path = toml(
        tmp_path / "file",
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'both'\n"
        "[[datasets.subsets]]\nimage_dir = 'only'\n",
    )
    (dataset,), problems, _ = resolve(dataset_config=path, resolution=64)
    assert problems == []
    folders = [subset.source.resolve() for subset in dataset.subsets]
    assert folders == [tmp_path / "here" / "both", tmp_path / "file" / "only"]


def test_home_and_environment_variables_are_put_in(
    tmp_path: Path, cats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PICTURES", str(cats))
    for given in ("~/cats", "$PICTURES", "${PICTURES}"):
        (dataset,), problems, _ = resolve(train_data_dir=Path(given), resolution=64)
        assert problems == []
        assert dataset.subsets[0].image_dir == cats


def test_no_repeats_would_train_nothing_and_is_refused(tmp_path: Path, cats: Path) -> None:
    text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{cats}'\n"
    (problem,) = problems_of(tmp_path, text, dataset_repeats=0)
    assert problem.startswith("--dataset_repeats: is 0")


def test_cached_text_refuses_changing_tags_and_names_both_places(
    tmp_path: Path, cats: Path
) -> None:
    text = (
        "[general]\nshuffle_caption = true\n[[datasets]]\n"
        f"[[datasets.subsets]]\nimage_dir = '{cats}'\ncaption_tag_dropout_rate = 0.1\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path}'\nshuffle_caption = false\n"
    )
    shuffled, dropped = problems_of(
        tmp_path, text, cache_text_encoder_outputs=True, caption_dropout_rate=0.5
    )
    path = tmp_path / "data.toml"
    assert shuffled.startswith(f"{path}:2: general.shuffle_caption: ")
    assert f"of {cats} would be frozen by --cache_text_encoder_outputs" in shuffled
    assert dropped.startswith(f"{path}:6: datasets[0].subsets[0].caption_tag_dropout_rate: ")


def test_wildcards_and_the_secondary_separator_are_checked_where_they_are_set(
    tmp_path: Path, cats: Path
) -> None:
    text = (
        "[general]\nresolution = 64\nenable_wildcard = true\ncaption_prefix = 'a {b|c'\n"
        "secondary_separator = ',,'\n"
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{cats}'\n"
    )
    frozen, separator, prefix = problems_of(tmp_path, text, cache_text_encoder_outputs=True)
    path = tmp_path / "data.toml"
    assert frozen.startswith(f"{path}:3: general.enable_wildcard: ")
    assert separator.startswith(f"{path}:5: general.secondary_separator: ',,' has the ")
    assert prefix.startswith(f"{path}:4: general.caption_prefix: 'a {{b|c', column 3: a brace ")


def test_the_caption_extension_is_given_under_one_name(cats: Path) -> None:
    (dataset,), _, _ = resolve(train_data_dir=cats, resolution=64, caption_extention="tags")
    assert dataset.subsets[0].caption_extensions == (".tags",)
    assert dataset.subsets[0].origins["caption_extension"] == place("caption_extention")
    options = {"caption_extention": "tags", "caption_extension": "tags"}
    _, (problem,), _ = resolve(train_data_dir=cats, resolution=64, **options)
    assert problem.startswith(f"{place('caption_extention')}: given together with ")


def test_the_file_takes_the_notations_of_sd_scripts(tmp_path: Path, cats: Path) -> None:
    subset = f"[[datasets.subsets]]\nimage_dir = '{cats}'\n"
    path = toml(
        tmp_path,
        f"""[general]
caption_dropout_rate = 1
[[datasets]]
resolution = "96,64"
{subset}
[[datasets]]
resolution = 96
{subset}
""",
    )
    configs, problems, _ = resolve(dataset_config=path)
    assert problems == []
    assert [config.resolution for config in configs] == [(96, 64), (96, 96)]
    assert configs[0].subsets[0].captions.caption_dropout_rate == 1.0


def test_resolving_and_planning_import_neither_torch_nor_pillow() -> None:
    code = (
        "import sys, sdxl_train.data.sources, sdxl_train.data.batches, sdxl_train.data.metadata;"
        "print(*{'torch', 'PIL', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_a_network_multiplier_other_than_one_is_refused(tmp_path: Path, cats: Path) -> None:
    text = "[[datasets]]\nnetwork_multiplier = {}\n[[datasets.subsets]]\nimage_dir = '{}'\n"
    assert problems_of(tmp_path, text.format(1, cats)) == []
    (problem,) = problems_of(tmp_path, text.format(0.5, cats))
    assert "network_multiplier: is 0.5, and only 1 can be trained" in problem


def test_unknown_custom_attributes_are_refused(tmp_path: Path, cats: Path) -> None:
    text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{cats}'\n"
    text += "custom_attributes = { diff_output_preservation = 1, difference = true }\n"
    told = "\n".join(problems_of(tmp_path, text))
    assert "custom_attributes.diff_output_preservation: 1 is not true or false" in told
    assert "custom_attributes.difference: is not a key of this table" in told


def test_cache_info_is_taken_and_its_effect_told(tmp_path: Path, cats: Path) -> None:
    text = f"[general]\ncache_info = true\n[[datasets]]\n[[datasets.subsets]]\nimage_dir='{cats}'\n"
    _, problems, warnings = resolve(dataset_config=toml(tmp_path, text), resolution=64)
    assert problems == []
    (warning,) = warnings
    assert warning.startswith(f"{tmp_path / 'data.toml'}:2: general.cache_info: sizes and captions")


def test_options_that_the_file_overrides_everywhere_are_told(tmp_path: Path, cats: Path) -> None:
    text = f"""[general]
batch_size = 2
[[datasets]]
[[datasets.subsets]]
image_dir = '{cats}'
flip_aug = false
num_repeats = 3
[[datasets]]
[[datasets.subsets]]
image_dir = '{cats}'
num_repeats = 4
"""
    _, problems, warnings = resolve(
        dataset_config=toml(tmp_path, text),
        resolution=64,
        train_batch_size=4,
        dataset_repeats=5,
        flip_aug=True,
    )
    assert problems == []
    assert [warning.split(" ")[0] for warning in warnings] == [
        "--dataset_repeats",
        "--train_batch_size",
    ]
    assert (
        f"the dataset file sets it ({tmp_path / 'data.toml'}:2: general.batch_size)" in warnings[1]
    )


def test_options_without_an_effect_are_told_with_their_place(tmp_path: Path, cats: Path) -> None:
    path = toml(
        tmp_path,
        f"""
        [general]
        keep_tokens = 2
        flip_aug = true
        [[datasets]]
        resolution = 64
        validation_seed = 3
        [[datasets.subsets]]
        image_dir = '{cats}'
        token_warmup_min = 2
        flip_aug = false
        """,
    )
    _, _, remarks = resolve(dataset_config=path)
    without = "has no effect without"
    tags = "shuffle_caption, caption_tag_dropout_rate or token_warmup_step"
    assert remarks == [
        f"{path}:4: general.flip_aug: has no effect, every table inside has its own",
        f"{path}:10: datasets[0].subsets[0].token_warmup_min: {without} token_warmup_step",
        f"{path}:3: general.keep_tokens: {without} {tags}",
        f"{path}:7: datasets[0].validation_seed: {without} validation_split",
    ]


def test_the_same_options_with_an_effect_are_not_remarked(cats: Path) -> None:
    options = {"keep_tokens": 1, "shuffle_caption": True, "validation_split": 0.5}
    _, _, remarks = resolve(train_data_dir=cats.parent, resolution=64, validation_seed=1, **options)
    assert not remarks


def test_caption_options_have_no_effect_beside_a_metadata_file(tmp_path: Path, cats: Path) -> None:
    metadata = tmp_path / "m.json"
    metadata.write_text('{"a": {"caption": "a cat"}}', encoding="utf-8")
    options = {"train_data_dir": cats, "in_json": metadata, "resolution": 64}
    _, _, remarks = resolve(caption_extension=".txt", **options)
    assert remarks == ["--caption_extension: has no effect without folders of caption files"]


def test_what_else_is_wrong_is_told_beside_wrong_keys(tmp_path: Path, cats: Path) -> None:
    text = f"[[datasets]]\nbatch_size = 0\n[[datasets.subsets]]\nimage_dir = '{cats}x'\nfoo = 1\n"
    told = "\n".join(problems_of(tmp_path, text))
    assert "batch_size: 0 is not a whole number >= 1" in told
    assert "foo: is not a key of this table" in told
    assert f"{cats}x does not exist" in told


@pytest.mark.parametrize("key", ["resolution = 'big'", "resolutoin = 32", "enable_bucket = 1"])
def test_without_a_key_that_decides_nothing_more_is_said(
    tmp_path: Path, cats: Path, key: str
) -> None:
    text = f"[[datasets]]\n{key}\n[[datasets.subsets]]\nimage_dir = '{cats}x'\n"
    (problem,) = problems_of(tmp_path, text)
    assert key.split()[0] in problem
