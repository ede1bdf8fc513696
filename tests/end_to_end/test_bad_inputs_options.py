"""Wrong options, files of options and places to write to: told at once, before anything is loaded.

The numbers are those of docs/bad-inputs.md.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from sdxl_train import UserError
from sdxl_train.cli import main
from sdxl_train.rules import LONGEST_NAME
from tests.end_to_end.conftest import as_flags

if TYPE_CHECKING:
    from tests.end_to_end.conftest import MakeOptions, Planned, TrainLora


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


def test_a_key_in_the_wrong_section_says_where_it_belongs_36(
    tmp_path: Path, planned: Planned, photographs: Path
) -> None:
    file = tmp_path / "data.toml"
    file.write_text(
        "[general]\nresolution = 64\n[[datasets]]\n[[datasets.subsets]]\n"
        f"image_dir = '{photographs / '2_photo'}'\nbatch_size = 2\n",
        encoding="utf-8",
    )
    code, text = planned(["--dataset_config", str(file)], train_data_dir=None)
    assert code == 2
    assert f"{file}:6: datasets[0].subsets[0].batch_size: is not a key of this table" in text
    assert "it belongs in [[datasets]] or [general]" in text


@pytest.mark.parametrize("text", ["seed = 1\nseed = 2\n", "[a]\nseed = 1\n[a]\nlowram = true\n"])
def test_what_stands_twice_is_refused_by_line_38(
    text: str, config_file: Path, planned: Planned
) -> None:
    config_file.write_text(text, encoding="utf-8")
    code, told = planned(["--config_file", str(config_file)])
    assert code == 2
    assert f"{config_file}:{text.count(chr(10)) - (text[0] == '[')}:" in told


def test_numbers_out_of_range_are_told_together_with_their_lines_39(
    config_file: Path, planned: Planned
) -> None:
    """A file has values that a command line has not: nan and inf are numbers of TOML."""
    lines = {
        "network_alpha": "-1.0",
        "learning_rate": "nan",
        "max_grad_norm": "inf",
        "train_batch_size": "0",
        "network_dim": "0",
        "caption_dropout_rate": "1.5",
        "dataset_repeats": "-1",
        "min_snr_gamma": "-inf",
    }
    text = "\n".join(f"{name} = {value}" for name, value in lines.items())
    config_file.write_text(text, encoding="utf-8")
    none = dict.fromkeys(lines, None)
    code, told = planned(["--config_file", str(config_file)], **none)
    assert code == 2
    for number, name in enumerate(lines, start=1):
        assert f"{config_file}:{number} {name}: " in told
    assert f"{len(lines)} problems" in told


def test_a_warmup_longer_than_the_run_is_told_beside_other_mistakes_39(planned: Planned) -> None:
    code, text = planned("--lr_scheduler cosine --lr_warmup_steps 20 --seed -1 --frobnicate 1")
    assert code == 2
    assert "--lr_warmup_steps: 20 warm-up steps in a run of 4 steps" in text
    assert "--seed: '-1' is not a whole number >= 0" in text
    assert "--frobnicate: unknown option" in text
    assert "3 problems" in text


def test_a_file_of_sd_scripts_is_read_as_it_is_46(config_file: Path, planned: Planned) -> None:
    """Its tables only group; what no component here has is named, never passed over."""
    config_file.write_text(
        "[training_arguments]\nmax_train_steps = 3\nsdpa = true\nlowram = false\n"
        "[network_arguments]\nnetwork_train_unet_only = true\n"
        "[folders]\nold_option_of_a_gui = 1\n",
        encoding="utf-8",
    )
    words = ["--config_file", str(config_file)]
    code, text = planned(words, max_train_steps=None)
    assert code == 2
    assert "1 problem" in text
    assert f"{config_file}:8 folders.old_option_of_a_gui: unknown option" in text


def test_a_schema_version_that_nobody_knows_is_refused_47(
    config_file: Path, planned: Planned
) -> None:
    config_file.write_text("schema_version = 9\n", encoding="utf-8")
    code, text = planned(["--config_file", str(config_file)])
    assert code == 2
    assert f"{config_file}:1 schema_version: unknown option" in text


def test_a_variable_without_a_value_makes_no_folder_of_its_name_48(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHERE", str(tmp_path))
    monkeypatch.delenv("NOWHERE", raising=False)
    assert planned(["--output_dir", "$WHERE/out"])[0] == 0
    code, text = planned(["--output_dir", "$WHERE/$NOWHERE/out"])
    assert code == 2
    assert "--output_dir" in text
    assert "$NOWHERE, which is not set" in text
    (tmp_path / "$NOWHERE").mkdir()
    assert planned(["--output_dir", f"{tmp_path}/$NOWHERE"])[0] == 0


def test_devices_that_are_not_there_are_told_beside_other_mistakes_56_57(
    options: MakeOptions, capsys: pytest.CaptureFixture[str], planned: Planned
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has them")
    wrong = ["--device", "cuda", "--mixed_precision", "fp16"]
    chosen = options(plugin=None)
    argv = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    assert main([*argv, *wrong, "--frobnicate", "1"]) == 2
    text = capsys.readouterr().err
    assert "3 problems" in text
    assert "--device: there is no cuda device on this machine" in text
    assert "--mixed_precision: fp16 needs a GPU" in text
    # Who plans here may train elsewhere.
    code, text = planned(wrong)
    assert code == 0
    assert "warning: not on this machine: --device: there is no cuda device" in text


def test_bf16_and_eight_bits_run_without_a_gpu_57(train_lora: TrainLora) -> None:
    run = train_lora(mixed_precision="bf16", optimizer_type="AdamW8bit", max_train_steps=1)
    assert run.result.exit_code == 0
    assert run.metadata["ss_mixed_precision"] == "bf16"


def test_an_output_folder_that_cannot_be_is_refused_58(
    planned: Planned, tmp_path: Path, tiny_file: Path
) -> None:
    code, text = planned(["--output_dir", str(tiny_file / "out")])
    assert code == 2
    assert f"--output_dir: {tiny_file} is a file, expected a folder" in text
    # The root user may write anywhere but where there is nothing to write to.
    closed = Path("/proc/self") if os.geteuid() == 0 else tmp_path / "closed"
    if os.geteuid():
        closed.mkdir(mode=0o500)
    code, text = planned(["--output_dir", str(closed / "out")])
    assert code == 2
    assert "--output_dir:" in text


@pytest.mark.parametrize("name", ["a/b", "../up", "a\\b", "", "a\0b", "a\nb", "x" * 201])
def test_a_name_that_makes_no_file_is_refused_58(name: str, planned: Planned) -> None:
    code, text = planned(["--output_name", name])
    assert code == 2
    assert "--output_name:" in text


def test_a_name_of_every_writing_makes_files_58(train_lora: TrainLora) -> None:
    for name in ("häßlich 写真 😀", ".hidden", "-dash", "x" * LONGEST_NAME):
        run = train_lora(output_name=name, max_train_steps=1, save_state=True)
        assert run.path.name == f"{name}.safetensors"
        assert (run.folder / f"{name}-state" / "state.json").is_file()
        assert (run.folder / f"{name}.run.json").is_file()


def test_names_of_images_may_be_no_utf8_and_those_of_folders_are_told_119(
    train_lora: TrainLora, photographs: Path, tmp_path: Path, planned: Planned
) -> None:
    """Python gives such bytes as lone surrogates, which no UTF-8 file holds."""
    folder = tmp_path / "data" / "1_coffee"
    folder.mkdir(parents=True)
    for ending in ("png", "txt"):
        copied = (photographs / "2_photo" / f"coffee.{ending}").read_bytes()
        (folder / os.fsdecode(f"cr\xe8me.{ending}".encode("latin-1"))).write_bytes(copied)
    run = train_lora(train_data_dir=str(folder.parent), max_train_steps=1, save_state=True)
    assert run.steps[0]["keys"] == ["1_coffee/cr\udce8me.png"]

    folder.rename(folder.with_name(os.fsdecode(b"1_caf\xe9")))
    code, text = planned(["--train_data_dir", str(folder.parent)])
    assert code == 2
    assert "'1_caf\\udce9' is not readable as text" in text


def test_json_of_a_plan_shows_names_as_escapes(
    options: MakeOptions,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They may steer a terminal, turn its text around, or be no UTF-8."""
    folder = tmp_path / "data" / "1_coffee"
    folder.mkdir(parents=True)
    shutil.copy(photographs / "2_photo" / "coffee.png", folder)
    names = {"a\x1b]0;title\x07\u202egnp.doc", os.fsdecode(b"caf\xe9.doc"), "\x9b猫.doc"}
    for name in names:
        (folder / name).touch()
    words = as_flags(options(train_data_dir=str(folder.parent), plugin=None))
    assert main(["plan", *words, "--json"]) == 0
    text = capsys.readouterr().out
    assert text.replace("\n", "").isprintable()
    assert text.isascii()
    skipped = json.loads(text)["dataset"]["skipped"]
    assert {Path(item["path"]).name for item in skipped} == names


def test_everything_wrong_is_told_at_once_and_quickly(
    planned: Planned, tmp_path: Path, config_file: Path
) -> None:
    """One answer for options, data, model, prompts, plugins and the file of options."""
    data = tmp_path / "data" / "1_cat"
    data.mkdir(parents=True)
    (data / "empty.png").write_bytes(b"")
    (data / "page.png").write_bytes(b"<html>")
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w wide\n", encoding="utf-8")
    config_file.write_text("network_dim = true\n", encoding="utf-8")
    started = time.process_time()
    code, text = planned(
        [
            *("--pretrained_model_name_or_path", str(model)),
            *("--train_data_dir", str(data.parent)),
            *("--sample_prompts", str(prompts), "--sample_every_n_steps", "1"),
            *("--config_file", str(config_file), "--plugin", "lycrois"),
            *("--optimizer_type", "AdamX", "--learning_rte", "1", "--seed", "x"),
            *("--resume", str(tmp_path / "nowhere"), "--output_dir", str(model)),
        ],
        network_dim=None,
    )
    assert time.process_time() - started < 5
    assert code == 2
    for told in (
        "model.safetensors is empty",
        "empty.png",
        "page.png",
        f"{prompts}:1 --w",
        f"{config_file}:1 network_dim: true is not",
        "no plugin 'lycrois' is installed",
        "did you mean Adamax?",
        "--learning_rte: unknown option",
        "--seed: 'x' is not",
        "nowhere does not exist",
        f"{model} is a file, expected a folder",
    ):
        assert told in text, text
    assert not (tmp_path / "out").exists()


def test_python_tells_the_same_mistakes(train_lora: TrainLora) -> None:
    with pytest.raises(UserError) as raised:
        train_lora(seed=-1, network_dim=0, max_train_steps="many")
    assert {problem.place for problem in raised.value.problems} == {
        "option max_train_steps",
        "option seed",
        "option network_dim",
    }
