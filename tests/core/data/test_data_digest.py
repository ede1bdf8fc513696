"""What a resumed run may find changed in its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sdxl_train.resume import dataset_digest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.core.data.conftest import MakeImage, MakeScan

CONFIG = """[[datasets]]
[[datasets.subsets]]
image_dir = "cats"
{}
"""


@pytest.mark.parametrize(
    "line",
    [
        "custom_attributes = { diff_output_preservation = true }",
        "token_warmup_step = 5",
        "shuffle_caption = true",
        "num_repeats = 2",
        "flip_aug = true",
        "alpha_mask = true",
    ],
)
def test_what_decides_the_training_is_part_of_the_digest(
    tmp_path: Path, make_image: MakeImage, make_scan: MakeScan, line: str
) -> None:
    make_image(tmp_path / "cats" / "a.png", caption="x")
    config = tmp_path / "data.toml"
    config.write_text(CONFIG.format(""), encoding="utf-8")
    plain = dataset_digest(make_scan(dataset_config=config))
    assert dataset_digest(make_scan(dataset_config=config, cache_info=True)) == plain
    config.write_text(CONFIG.format(line), encoding="utf-8")
    assert dataset_digest(make_scan(dataset_config=config)) != plain
