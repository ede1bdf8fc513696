"""Optimizers that keep tensors in nested dicts are saved whole; those with one rate get one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdxl_train.assembly import _require_one_rate
from sdxl_train.errors import UserError
from sdxl_train.state import _merge, _split


def test_nested_tensors_are_saved_beside_the_plain_values() -> None:
    inner = {"state1": torch.ones(2, dtype=torch.uint8), "size": 3}
    state = {0: {"step": 4, "mean": torch.zeros(1), "quantised": inner}, 1: {"step": 4}}
    tensors, plain = _split({"state": state, "param_groups": [{"lr": 1.0}]})
    assert tensors.keys() == {"0.mean", "0.quantised.state1"}
    assert plain["state"]["0"] == {"step": 4, "quantised": {"size": 3}}
    assert _merge(tensors, plain) == {"state": state, "param_groups": [{"lr": 1.0}]}


def test_rates_that_differ_are_refused_where_only_one_is_possible() -> None:
    config: Any = SimpleNamespace(
        optimizer=SimpleNamespace(single_lr=True),
        settings={"unet_lr": None, "text_encoder_lr": None, "seed": None},
        place=lambda name: f"--{name}",
        name_of=lambda kind: "Prodigy",
    )
    same = [{"name": "unet", "lr": 1.0}, {"name": "te1", "lr": 1.0}]
    _require_one_rate(config, same)
    with pytest.raises(UserError) as caught:
        _require_one_rate(config, [*same, {"name": "te2", "lr": 0.5}])
    (problem,) = caught.value.problems
    assert problem.place == "--optimizer_type, --unet_lr, --text_encoder_lr"
    assert "te2 0.5" in problem.message
