"""Samples whose target is what the model predicts without the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import TrainLora

CONFIG = """[[datasets]]
batch_size = 2
[[datasets.subsets]]
image_dir = "{first}"
{one}
[[datasets.subsets]]
image_dir = "{second}"
{two}
"""
PRESERVED = "custom_attributes = { diff_output_preservation = true }"


def test_preserved_samples_are_trained_to_the_bare_models_output(
    train_lora: TrainLora, photographs: Path, tmp_path: Path
) -> None:
    for name in ("coffee", "rocket"):
        (tmp_path / name).mkdir()
        for suffix in (".png", ".txt"):
            source = photographs / "2_photo" / f"{name}{suffix}"
            (tmp_path / name / source.name).write_bytes(source.read_bytes())

    def losses(one: str, two: str) -> list[float]:
        config = tmp_path / "data.toml"
        first, second = tmp_path / "coffee", tmp_path / "rocket"
        config.write_text(CONFIG.format(first=first, second=second, one=one, two=two))
        run = train_lora(
            train_data_dir=None, dataset_config=str(config), max_train_steps=2, learning_rate=0.1
        )
        return [step["loss"] for step in run.steps]

    plain = losses("", "")
    first = losses(PRESERVED, "")
    second = losses("", PRESERVED)
    # A fresh network changes nothing, so a preserved sample's loss is 0 at first: each of the two
    # leaves the other one's half.
    assert first[0] + second[0] == pytest.approx(plain[0], rel=1e-4)
    assert 0 < first[0] < plain[0]
    # What the network learns of the other sample moves it from the bare model's output.
    assert first[1] != pytest.approx(plain[1], rel=1e-4)
