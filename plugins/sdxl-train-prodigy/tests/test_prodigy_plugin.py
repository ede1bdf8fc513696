"""Prodigy: sd-scripts' trajectories, one rate for all groups, and states to resume from."""

from __future__ import annotations

import gzip
import json
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdxl_train import UserError
from sdxl_train.assembly import _require_one_rate
from sdxl_train.options import Setting, Words, validate
from sdxl_train.state import Manifest, load_optimizer, save_state
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
    given = {
        name: Setting(value=Words((value,)), place=name, origin="command line")
        for name, _, value in (pair.partition("=") for pair in row["args"])
    }
    problems: list[Any] = []
    component: Any = validate(Prodigy, given, problems)
    assert problems == []
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


def test_prodigy_resumes_exactly(tmp_path: Path) -> None:
    def steps(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter) -> None:
        for _ in range(4):
            torch.autograd.backward((p - 3).square().sum())
            optimizer.step()
            optimizer.zero_grad()

    p = torch.nn.Parameter(torch.linspace(-1, 1, 64))
    optimizer = Prodigy(d0=1e-3).build(group(p))
    steps(optimizer, p)
    save_state(
        tmp_path / "a-state",
        Manifest(step=4, total=8, seed=0, options={}, dataset="", model="", plugins={}),
        parameters=[p],
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        scaler=None,
    )
    again = torch.nn.Parameter(p.detach().clone())
    steps(optimizer, p)
    resumed = Prodigy(d0=1e-3).build(group(again))
    load_optimizer(tmp_path / "a-state", optimizer=resumed, scheduler=None, scaler=None)
    steps(resumed, again)
    assert torch.equal(again, p)


def test_rate_is_one_by_default_and_one_for_all() -> None:
    assert Prodigy().learning_rate == 1.0
    config: Any = SimpleNamespace(
        optimizer=Prodigy(),
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


def test_entry_point_registers_prodigy() -> None:
    (entry,) = entry_points(group="sdxl_train", name="prodigy")
    assert entry.load().register_optimizers() == {
        "Prodigy": Prodigy,
        "prodigyopt.Prodigy": Prodigy,
    }
