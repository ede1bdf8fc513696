"""Characters that steer a terminal come from names of files, and are shown as escapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdxl_train.cli.console import report, warn
from sdxl_train.data.findings import Findings
from sdxl_train.errors import UserError
from sdxl_train.wording import in_one_line, visible

NAME = "a\x1b]0;title\x07\nb\u202egnp.png"
"""Sets a window's title, ends the line, and writes from right to left: ISO 6429, Unicode TR 9."""


def test_lines_and_letters_of_any_script_stay() -> None:
    text = "Kätzchen\n\t猫 שלום 😀"
    assert visible(text) == text
    assert in_one_line("a\tb\nc") == r"a\tb\nc"


@pytest.mark.parametrize("character", ["\x00", "\r", "\x1b", "\x7f", "\x9b", "\u2028", "\u202e"])
def test_what_steers_a_terminal_is_an_escape(character: str) -> None:
    assert visible(f"a{character}b") == f"a{character.encode('unicode_escape').decode()}b"


def test_no_name_of_a_file_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    findings = Findings(skip_bad=False)
    findings.bad_image(Path(NAME), f"{NAME} is damaged")
    findings.remarks.add("odd", Path(NAME))
    report(UserError(findings.problems))
    warn(findings.remarks.lines())
    told = capsys.readouterr().err
    assert not {"\x1b", "\x07", "\u202e"} & set(told)
    assert r"  a\x1b]0;title\x07\nb\u202egnp.png: a\x1b]0;title\x07" in told
    assert r"warning: 1 file: odd: a\x1b]0;title\x07\nb\u202egnp.png" in told


def test_of_many_problems_alike_the_first_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    findings = Findings(skip_bad=False)
    for number in range(23):
        findings.bad_image(Path(f"{number}.png"), "is empty")
    findings.bad_image(Path("last.png"), "is damaged")
    report(UserError(findings.problems))
    told = capsys.readouterr().err
    assert told.startswith("sdxl-train: 24 problems")
    assert told.count(".png: is empty\n") == 20
    assert told.endswith("  and 3 more: is empty\n")
    assert "last.png: is damaged" in told
