"""Prodigy: sd-scripts' trajectories, one rate for all groups, and states to resume from."""

from __future__ import annotations

import ast
import gzip
import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_train_prodigy import Prodigy

GOLDEN = Path(__file__).parent / "data" / "optimizers_prodigy.json.gz"


def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(GOLDEN.read_bytes()))
    return found


def group(*parameters: torch.nn.Parameter, lr: float = 1.0) -> list[dict[str, Any]]:
    return [{"params": list(parameters), "lr": lr, "name": "all"}]


@pytest.mark.parametrize("row", rows(), ids=["defaults", "options"])
def test_prodigy_takes_the_golden_steps(row: dict[str, Any]) -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(8, 128))
    q = torch.nn.Parameter(torch.randn(64))
    target = torch.randn(8, 128)
    pairs = (pair.split("=") for pair in row["args"])
    component = Prodigy(**{name: ast.literal_eval(value) for name, value in pairs})
    optimizer = component.build(group(p, q, lr=row["lr"]))
    assert {name: optimizer.defaults[name] for name in row["defaults"] if name != "betas"} == {
        name: value for name, value in row["defaults"].items() if name != "betas"
    }
    for step in row["trajectory"]:
        loss = torch.nn.functional.mse_loss(p, target) + q.square().mean()
        assert loss.item() == pytest.approx(step["loss"], rel=1e-6)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        assert p.flatten()[:4].tolist() == pytest.approx(step["p0"], abs=1e-6)
        assert q[:4].tolist() == pytest.approx(step["q0"], abs=1e-6)


def test_rate_is_one_by_default_and_one_for_all() -> None:
    assert Prodigy().learning_rate == 1.0
    assert Prodigy.single_lr


def test_entry_point_registers_prodigy() -> None:
    (entry,) = entry_points(group="sdxl_train", name="prodigy")
    assert entry.load().register_optimizers() == {
        "Prodigy": Prodigy,
        "prodigyopt.Prodigy": Prodigy,
    }
