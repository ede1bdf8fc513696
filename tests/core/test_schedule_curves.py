"""``sdxl-train components scheduler:NAME --plot``: the curve in the terminal, or a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from PIL import Image

from sdxl_train.cli import main

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")


def test_curve_rises_and_falls_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    words = "components scheduler:linear --plot --max_train_steps 100 --lr_warmup_steps 50%"
    assert main(words.split()) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[0].strip() == "linear: share of the rate over 100 steps"
    curve = [line.partition("┤")[2] or line.partition("│")[2] for line in lines[2:-3]]
    blank = (" ", chr(0x2800))
    depths = [
        next(depth for depth, row in enumerate(curve) if row[column] not in blank)
        for column in range(2, 70, 4)
    ]
    top = depths.index(min(depths))
    assert abs(top - len(depths) / 2) <= 1
    assert depths[: top + 1] == sorted(depths[: top + 1], reverse=True)
    assert depths[top:] == sorted(depths[top:])
    assert "\x1b" not in "".join(lines)


def test_curve_of_any_class_goes_into_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    words = "components scheduler:torch.optim.lr_scheduler.OneCycleLR --lr_scheduler_args max_lr=1"
    assert main([*words.split(), "--plot", str(path)]) == 0
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert len(set(picture.convert("L").tobytes())) > 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("components scheduler --plot", "draws one learning-rate schedule"),
        ("components optimizer:AdamW --plot", "draws one learning-rate schedule"),
        ("components scheduler:rex --plot curve.jpg", "expected a .png"),
        ("components scheduler:rex --plot --json", "leave out --json"),
        ("components scheduler:constant --plot --lr_warmup_steps 5", "no warm-up"),
        ("components scheduler:cosine --plot --lr_decay_steps 5", "lr_decay_steps"),
        ("components scheduler:cosine --plot --max_train_steps 0", "max_train_steps"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err
