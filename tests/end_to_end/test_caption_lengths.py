"""Captions that the model does not read to their end are counted and named."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

import sdxl_train

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import MakeOptions, TrainLora


@pytest.fixture
def wordy(photographs: Path, tmp_path: Path) -> Path:
    """Two photographs: a caption of 100 words, each one token, and a short one."""
    folder = tmp_path / "1_photo"
    folder.mkdir()
    for name, caption in (("coffee", " ".join(["cat"] * 100)), ("rocket", "a rocket")):
        (folder / f"{name}.png").write_bytes((photographs / "2_photo" / f"{name}.png").read_bytes())
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return tmp_path


def test_plan_names_the_captions_that_are_cut(options: MakeOptions, wordy: Path) -> None:
    plan = sdxl_train.plan(options(train_data_dir=str(wordy)))
    path = str(wordy / "1_photo" / "coffee.png")
    assert plan.dataset["captions"] == {
        "limit": 75,
        "longest": 100,
        "truncated": [{"path": path, "tokens": 100}],
    }
    (told,) = [text for text in plan.warnings if "max_token_length" in text]
    assert told.startswith("1 of 2 captions are cut after 75 tokens; the longest has 100: ")
    assert f"{path} (100)" in told
    plan = sdxl_train.plan(options(train_data_dir=str(wordy), max_token_length=150))
    assert plan.dataset["captions"] == {"limit": 150, "longest": 100, "truncated": []}
    assert not [text for text in plan.warnings if "max_token_length" in text]


def test_training_warns_of_them_and_takes_weights_and_layers(
    train_lora: TrainLora, wordy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run = train_lora(
            train_data_dir=str(wordy),
            max_train_steps=1,
            clip_skip=1,
            weighted_captions=True,
            token_warmup_step=5,
        )
    assert "1 of 2 captions are cut after 75 tokens" in caplog.text
    assert "clip_skip trains on layer 1 from the last" in caplog.text
    assert "the run ends after 1 of its 5 steps" in caplog.text
    assert run.metadata["ss_clip_skip"] == "1"
