"""How the command line behaves when something is wrong with it, or around it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_train.cli import main
from sdxl_train.cli.console import configure_output

if TYPE_CHECKING:
    import pytest

    from tests.core.conftest import Command, Site


def test_a_second_run_in_a_process_says_everything_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):
        configure_output()
        for _ in range(3):
            logging.getLogger("sdxl_train.run").info("latents on disk: 8 reused")
    assert capsys.readouterr().err == "latents on disk: 8 reused\n" * 2


def test_an_unknown_command_names_the_nearest(command: Command) -> None:
    done = command("plugin")

    assert done.returncode == 2
    assert "there is no command 'plugin'\n      -> did you mean plugins?" in done.stderr


def test_words_that_belong_to_no_flag_are_told(command: Command) -> None:
    done = command("plan", "folder", "--seed", "1")

    assert done.returncode == 2
    assert "unexpected word 'folder'\n      -> options are written --name value" in done.stderr


def test_a_letter_that_training_does_not_know_is_told(command: Command) -> None:
    done = command("-x", "1")

    assert done.returncode == 2
    assert "-x: unknown option" in done.stderr


def test_all_mistakes_are_told_at_once_without_traceback(command: Command) -> None:
    line = (
        "--network-dim 0 --mixed_precision bf61 --learning_rate nan --max_train_step 5 "
        "--sdpa=perhaps --train_data_dir gone --network_args dim"
    )
    done = command(*line.split())

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for expected in (
        "problems, nothing was started",
        "--network-dim: '0' is not a whole number >= 1",
        "--mixed_precision: 'bf61' is not one of no, fp16, bf16; did you mean bf16?",
        "--learning_rate: 'nan' is not a number >= 0",
        "--max_train_step: unknown option\n      -> did you mean max_train_steps?",
        "--sdpa: 'perhaps' is not true or false",
        "--network_args: 'dim' is not key=value",
        "--pretrained_model_name_or_path: is required",
        "--output_dir: is required",
        "--train_data_dir: ",
    ):
        assert expected in done.stderr


def test_the_script_and_the_module_are_the_same(command: Command) -> None:
    script = subprocess.run(
        [str(Path(sys.executable).with_name("sdxl-train")), "--help"],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "COLUMNS": "100"},
        check=True,
    )

    assert script.stdout == command("--help").stdout


def test_a_console_that_cannot_show_a_letter_is_no_error(site: Site, command: Command) -> None:
    site.add("grain", site.noise.replace("Grain, for tests.", "Körnung, 粒."))

    done = command(
        "components",
        "noise",
        "--plugin",
        "grain",
        environment={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"},
    )

    assert done.returncode == 0, done.stderr
    assert "K\\xf6rnung" in done.stdout


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "sdxl_train", "--help"],
            stdout=gone,
            stderr=subprocess.PIPE,
            check=False,
        )

    assert (done.returncode, done.stderr) == (0, b"")


def test_closed_outputs_are_no_error() -> None:
    """Services start programs without outputs; Python then has None in their place."""
    for words, code in (("--version", 0), ("--frobnicate", 2)):
        line = f'"{sys.executable}" -m sdxl_train {words} >&- 2>&-'
        assert subprocess.run(line, shell=True, check=False).returncode == code


def test_an_interrupt_before_the_run_exits_with_130(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.add("slow", "raise KeyboardInterrupt")

    assert main(["--plugin", "slow", "--seed", "1"]) == 130


def test_a_switch_of_a_command_takes_no_value(command: Command) -> None:
    done = command("plugins", "--json", "yes")

    assert done.returncode == 2
    assert "--json: takes no value, got 'yes'" in done.stderr
