"""Options from TOML files, and back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import tomli

from sdxl_train.errors import UserError
from sdxl_train.options import Words
from sdxl_train.settings import from_file, from_words, merge
from sdxl_train.toml_files import read_toml

if TYPE_CHECKING:
    from pathlib import Path

    from tests.core.conftest import Command, Resolve, Site


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _complaints(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        from_file(path)
    return [str(problem) for problem in caught.value.problems]


def test_tables_only_group(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        "seed = 1\n[training]\nlearning-rate = 1e-4\n[training.deep.deeper]\nflip_aug = true\n"
        '[a.network_args]\nconv_dim = 4\n[b]\noptimizer_args = ["eps=1"]\n',
    )

    settings = from_file(path)

    assert {name: setting.value for name, setting in settings.items()} == {
        "seed": 1,
        "learning_rate": 1e-4,
        "flip_aug": True,
        "network_args": {"conv_dim": 4},
        "optimizer_args": ["eps=1"],
    }
    assert settings["learning_rate"].place == f"{path}:3 training.learning-rate"
    assert settings["flip_aug"].origin == f"{path}:5"
    assert settings["network_args"].origin == f"{path}:6"


def test_one_key_in_two_tables_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = _file(tmp_path, "[a]\nseed = 1\n[b]\nseed = 2\n[c]\nplugin = []\nplugins = []\n")

    assert _complaints(path) == [
        f"{path}:4 b.seed: stands twice, before at {path}:2 a.seed\n    -> remove one",
        f"{path}:7 c.plugins: stands twice, before at {path}:6 c.plugin\n    -> remove one",
    ]


def test_a_file_cannot_name_another(tmp_path: Path) -> None:
    path = _file(tmp_path, 'config_file = "x.toml"\noutput_config = true\n')

    assert [text.partition("\n")[0] for text in _complaints(path)] == [
        f"{path}:1 config_file: is for the command line only",
        f"{path}:2 output_config: is for the command line only",
    ]


@pytest.mark.parametrize(
    ("text", "place", "remedy"),
    [
        ('a = 1\npath = "C:\\Users"\n', "2:", "a backslash"),
        ("flip_aug = True\n", "1:", "lower case"),
        ("name = hello\n", "1:", "text needs quotes"),
        ("a = 1\na = 2\n", "2:", "correct this line"),
        ("[x]\n[x]\n", "2:", "correct this line"),
        ("a = [\n", "2:", "correct this line"),
        ("a = [", "1:", "correct this line"),
    ],
)
def test_a_syntax_error_is_told_with_line_and_remedy(
    tmp_path: Path, text: str, place: str, remedy: str
) -> None:
    path = _file(tmp_path, text)

    (complaint,) = _complaints(path)

    assert complaint.startswith(f"{path}:{place}")
    assert remedy in complaint


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("seed = 1".encode("utf-16"), "run.toml: is encoded as UTF-16"),
        (b"# x\nname = 'caf\xe9'\n", "run.toml:2: byte 0xe9 is not UTF-8"),
    ],
)
def test_another_encoding_is_told(tmp_path: Path, data: bytes, complaint: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(data)

    assert complaint in _complaints(path)[0]


def test_a_byte_order_mark_and_windows_lines_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 1\r\nflip_aug = true\r\n")

    assert from_file(path)["flip_aug"].origin == f"{path}:2"


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    (complaint,) = _complaints(tmp_path / "gone.toml")

    assert "cannot be read: No such file or directory" in complaint


def test_lines_of_array_tables_are_found(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        "[general]\na = 1\n[[datasets]]\nresolution = 1\n"
        "  [[datasets.subsets]]\n  image_dir = 'x'\n"
        "  [[datasets.subsets]]\n  image_dir = 'y'\n[[datasets]]\n[[datasets.subsets]]\nb.c = 1\n",
    )

    _, lines = read_toml(path)

    assert lines["datasets", 0] == 3
    assert lines["datasets", 0, "subsets", 1, "image_dir"] == 8
    assert lines["datasets", 1] == 9
    assert lines["datasets", 1, "subsets", 0, "b", "c"] == 11


def test_the_command_line_wins_and_lists_add_up(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        'seed = 1\nlearning_rate = 1.0\nplugins = ["one"]\nnetwork_args = ["dim=1"]\n',
    )
    notices: list[str] = []
    words = f"--config_file {path} --seed 2 --plugin two --network_args dim=2".split()

    settings = merge(from_words(words, notices)[0], notices)

    assert settings["seed"].value == Words(("2",))
    assert settings["seed"].origin == "command line"
    assert settings["learning_rate"].origin == f"{path}:2"
    assert settings["plugin"].value == Words(("one", "two"))
    assert settings["plugin"].place == f"{path}:3 plugins and --plugin"
    assert notices == [f"--network_args replaces all of {path}:4 network_args"]


def test_the_ending_of_the_file_may_be_left_out(tmp_path: Path) -> None:
    _file(tmp_path, "seed = 1\n")

    settings = merge(from_words(["--config_file", str(tmp_path / "run")], [])[0], [])

    assert settings["seed"].value == 1


@pytest.mark.parametrize(
    "words", [["--config_file"], ["--config_file="], ["--config_file", "a", "b"]]
)
def test_one_file_must_be_named(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"--config_file: got .* expected one TOML file"):
        merge(from_words(words, [])[0], [])


def test_mistakes_in_a_file_are_told_at_once_with_their_lines(
    tmp_path: Path, command: Command
) -> None:
    path = _file(
        tmp_path,
        '[model]\npretrained_model_name_or_path = "base.safetensors"\n[training]\n'
        'learnig_rate = 1e-4\nlr_warmup_steps = "soon"\nseed = true\nmax_grad_norm = "1e-4"\n'
        '[network]\nnetwork_args.conv_dims = 4\nplugins = ["licoris"]\n',
    )

    done = command("--config_file", str(path))

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for expected in (
        f"{path}:4 training.learnig_rate: unknown option\n      -> did you mean learning_rate?",
        f'{path}:5 training.lr_warmup_steps: "soon" is not a whole number >= 0 or a number',
        f"{path}:6 training.seed: true is not a whole number >= 0",
        f'{path}:7 training.max_grad_norm: "1e-4" is not a number >= 0; write it without quotes',
        f"{path}:9 network.network_args.conv_dims: network lora has no option 'conv_dims'",
        f"{path}:10 network.plugins: no plugin 'licoris' is installed",
        "--output_dir: is required",
    ):
        assert expected in done.stderr


def test_every_value_has_its_origin(tmp_path: Path, resolve: Resolve) -> None:
    path = _file(
        tmp_path, "[x]\nnetwork_dim = 8\nmin_snr_gamma = 5\n[x.optimizer_args]\neps = 1e-6\n"
    )

    resolution = resolve("--config_file", str(path), "--learning_rate", "1e-4")

    assert resolution.problems == []
    assert resolution.config is not None
    options = resolution.config.options()
    assert options["network_dim"] == {"value": 8, "origin": f"{path}:2"}
    assert options["min_snr_gamma"] == {"value": 5.0, "origin": f"{path}:3"}
    assert options["optimizer_args.eps"] == {"value": 1e-6, "origin": f"{path}:5"}
    assert options["learning_rate"] == {"value": 1e-4, "origin": "command line"}
    assert options["max_grad_norm"] == {"value": 1.0, "origin": "default"}


def test_output_config_writes_what_config_file_reads(
    site: Site, command: Command, tmp_path: Path, resolve: Resolve
) -> None:
    site.add("grain")
    line = (
        "--pretrained_model_name_or_path base --output_dir out --network_dim 8 --sdpa "
        "--learning_rate 1e-4 --optimizer_args betas=0.9,0.99 weight_decay=0.1 "
        "--plugin grain --grain 0.25 --text_encoder_lr 1e-5 2e-5 --output_name"
    )
    path = tmp_path / "made.toml"

    done = command(
        *line.split(), "my lora", "--config_file", str(tmp_path / "made"), "--output_config"
    )

    assert done.returncode == 0, done.stderr
    document = tomli.loads(path.read_text(encoding="utf-8"))
    assert document["plugin"] == ["grain"]
    assert document["optimizer_args"] == {"betas": [0.9, 0.99], "weight_decay": 0.1}
    assert "max_grad_norm" not in document
    again = resolve("--config_file", str(path))
    assert again.problems == []
    assert again.config is not None
    options = {name: item["value"] for name, item in again.config.options().items()}
    assert options["output_name"] == "my lora"
    assert options["text_encoder_lr"] == [1e-5, 2e-5]
    assert options["grain"] == 0.25
    assert options["optimizer_args.betas"] == [0.9, 0.99]


def test_output_config_overwrites_nothing_and_writes_no_mistakes(
    command: Command, tmp_path: Path
) -> None:
    path = _file(tmp_path, "seed = 1\n")

    exists = command("--config_file", str(path), "--output_config", "--output_dir", "out")
    wrong = command("--config_file", str(tmp_path / "new"), "--output_config", "--seed", "x")
    unnamed = command("--output_config", "--output_dir", "out")

    assert [done.returncode for done in (exists, wrong, unnamed)] == [2, 2, 2]
    assert "exists already" in exists.stderr
    assert "--seed: 'x' is not a whole number >= 0" in wrong.stderr
    assert not (tmp_path / "new.toml").exists()
    assert "--output_config: needs a file to write to" in unnamed.stderr
    assert path.read_text(encoding="utf-8") == "seed = 1\n"


def test_plan_as_json_tells_mistakes_too(command: Command) -> None:
    done = command("plan", "--json", "--sede", "1")

    assert done.returncode == 2
    errors = json.loads(done.stdout)["errors"]
    assert any(
        "--sede: unknown option" in error and "did you mean seed?" in error for error in errors
    )
