"""Optimizers that keep tensors in nested dicts are saved whole; those with one rate get one."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdxl_train.assembly import _require_one_rate
from sdxl_train.errors import UserError
from sdxl_train.packing import pack, unpack


def test_nested_values_come_back_as_they_were() -> None:
    inner = {"state1": torch.ones(2, dtype=torch.uint8), "size": 3, "dtype": torch.bfloat16}
    state: dict[str, Any] = {
        "state": {0: {"step": 4, "mean": torch.zeros(1), "inner": inner}, "k": torch.ones(())}
    }
    state["param_groups"] = {"betas": (0.9, 0.99), "lr": 1.0, "none": None, "list": [1, "a"]}
    tensors: dict[str, torch.Tensor] = {}
    plain = json.loads(json.dumps(pack(state, tensors, "optimizer")))
    assert tensors.keys() == {
        "optimizer.state.0.mean",
        "optimizer.state.0.inner.state1",
        "optimizer.state.k",
    }
    assert unpack(plain, tensors) == state


def test_transposed_tensors_come_back_transposed() -> None:
    """eigh gives such ones; a product with a copy that lies otherwise may round otherwise."""
    value = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)
    tensors: dict[str, torch.Tensor] = {}
    plain = json.loads(json.dumps(pack({"basis": [value]}, tensors, "state")))
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    (found,) = unpack(plain, tensors)["basis"]
    assert torch.equal(found, value)
    assert found.stride() == value.stride()


def test_what_has_no_place_in_a_file_is_named() -> None:
    with pytest.raises(TypeError, match=r"optimizer\.state\.0\.projector is a object"):
        pack({"state": {0: {"projector": object()}}}, {}, "optimizer")


def test_rates_that_differ_are_refused_where_only_one_is_possible() -> None:
    config: Any = SimpleNamespace(
        optimizer=SimpleNamespace(single_lr=True),
        given_rates=lambda: ["--unet_lr", "--text_encoder_lr"],
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
