"""Each family of optimizers goes on from its state, bit for bit: resumed twice, in mid-epoch."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import SameTensors, TrainLora

RANDOM: dict[str, Any] = {
    "shuffle_caption": True,
    "caption_dropout_rate": 0.3,
    "network_dropout": 0.1,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 5,
    "plugin": None,
}
"""Five steps over epochs of three; states after steps 1 and 4 lie in the middle of one."""

WARM = {"lr_scheduler": "cosine", "lr_warmup_steps": 2}
STATES = {"save_state_every_n_steps": 1, "save_state_on_train_end": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "one state": {"optimizer_type": "SGDNesterov", **WARM},
    "two states, worker processes": {
        "optimizer_type": "AdamW",
        "max_data_loader_n_workers": 2,
        **WARM,
    },
    "8 bits": {
        "optimizer_type": "AdamW8bit",
        # Small tensors keep 32 bits otherwise.
        "optimizer_args": ["min_8bit_size=1"],
        **WARM,
    },
    "its own rate": {"optimizer_type": "Prodigy", "learning_rate": 1, **WARM},
    "factored": {"optimizer_type": "Adafactor"},
    # Blocked, the plugin that has declared this class leaves it to the constructor's signature.
    "by a dotted path": {
        "optimizer_type": "pytorch_optimizer.CAME",
        "plugin": ["no:optimizers"],
        **WARM,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_optimizers_resumes_exactly(
    family: str, train_lora: TrainLora, same_tensors: SameTensors, tmp_path: Path
) -> None:
    options = {**RANDOM, **FAMILIES[family]}
    if family != "two states, worker processes":
        options["network_train_unet_only"] = True  # one family is enough for the text encoders
    straight = train_lora(**options, **STATES)

    shutil.copytree(straight.folder / "photo-step00000001-state", tmp_path / "from")
    once = train_lora(**options, **STATES, resume=str(tmp_path / "from"))
    assert same_tensors(once.tensors, straight.tensors)

    state = str(once.folder / "photo-step00000004-state")
    twice = train_lora(**{**options, "max_data_loader_n_workers": 0}, resume=state)
    assert same_tensors(twice.tensors, straight.tensors)
    assert twice.result.steps == 5
