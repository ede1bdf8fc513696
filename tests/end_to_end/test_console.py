"""What a run says: lines in a pipe or a file, a bar on a terminal, in any encoding."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sdxl_train.cli import main
from tests.end_to_end.conftest import as_flags

if TYPE_CHECKING:
    from tests.end_to_end.conftest import MakeOptions

NUMBERS = (
    r"loss \d+\.\d{4} \(mean \d+\.\d{4}\), lr 0\.001, [\d.e-]+ s/it, [\d.e+-]+ img/s, "
    r"\d+\.\d\d GB"
)
COLOUR = re.compile(r"\x1b\[\d+(;\d+)*m")


def test_a_pipe_gets_a_few_plain_lines(
    options: MakeOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = options(plugin=None, progress=True, max_train_steps=25, network_train_unet_only=True)
    assert main(as_flags(chosen)) == 0
    output, log = capsys.readouterr()
    lines = [line for line in log.splitlines() if line.startswith("step ")]
    assert 10 <= len(lines) <= 14
    for line in lines:
        assert re.fullmatch(rf"step \d+/25, {NUMBERS}, \d\d:\d\d left", line), line
    assert lines[-1].startswith("step 25/25")
    assert "\r" not in log
    assert not COLOUR.search(log + output)
    assert re.search(r"^steps +25 optimizer steps: ", output, re.MULTILINE)


def test_the_log_goes_to_a_file_and_says_no_less_than_asked(
    options: MakeOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "run.log"
    log.write_text("of an earlier run", encoding="utf-8")
    chosen = options(plugin=None, progress=True, max_train_steps=1, save_last_n_steps=2)
    assert main([*as_flags(chosen), "--console_log_file", str(log)]) == 0
    text = log.read_text(encoding="utf-8")
    assert "step 1/1, loss" in text
    assert "warning: --save_last_n_steps has no effect" in text
    assert "earlier run" not in text
    assert capsys.readouterr().err == ""

    quiet = options(plugin=None, progress=True, max_train_steps=1, save_last_n_steps=2)
    assert main([*as_flags(quiet), "--console_log_level", "ERROR"]) == 0
    assert capsys.readouterr().err == ""
    # What a run says is its own business: the next one says everything again.
    assert main([*as_flags(options(plugin=None)), "--seed", "x"]) == 2
    assert "--seed" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told_before_anything_starts(
    options: MakeOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = as_flags(options(plugin=None))
    gone = tmp_path / "gone" / "run.log"
    assert main([*words, "--console_log_file", str(gone)]) == 2
    assert "--console_log_file" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("simple", [False, True])
def test_a_terminal_of_little_letters_gets_a_bar_without_colour(
    options: MakeOptions, simple: bool
) -> None:
    import fcntl
    import pty
    import struct
    import termios

    chosen = options(plugin=None, progress=True, max_train_steps=3, output_name="kätzchen")
    if simple:
        chosen["console_log_simple"] = True
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 40, 160, 0, 0))
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("sdxl-train")), *as_flags(chosen)],
        stdout=terminal,
        stderr=terminal,
        env={
            **os.environ,
            "LC_ALL": "C",
            "PYTHONIOENCODING": "ascii",
            "PYTHONCOERCECLOCALE": "0",
            "NO_COLOR": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    os.close(terminal)
    heard = b""
    # The end of a terminal whose last writer has gone is an error on Linux.
    try:
        while part := os.read(master, 65536):
            heard += part
    except OSError:
        pass
    os.close(master)
    assert process.wait(timeout=60) == 0, heard
    text = heard.decode("ascii")
    assert not COLOUR.search(text)
    assert "Traceback" not in text
    bars = re.findall(rf"steps 100% \|#+\| 3/3 \[[\d:]+<[\d:]+, {NUMBERS}\]", text)
    lines = re.findall(rf"step 3/3, {NUMBERS}", text)
    assert (bool(bars), bool(lines)) == (not simple, simple), text
