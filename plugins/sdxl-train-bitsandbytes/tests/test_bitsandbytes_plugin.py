"""Optimizers of bitsandbytes: sd-scripts' trajectories, names, and states to resume from."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_train_bitsandbytes import register_optimizers

OPTIMIZERS: dict[str, Any] = dict(register_optimizers())
GOLDEN = Path(__file__).parent / "data" / "optimizers_bitsandbytes.json.gz"

# bitsandbytes says once for each that a CPU has no pages; the numbers are the same.
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(GOLDEN.read_bytes()))
    return found


def group(*parameters: torch.nn.Parameter, lr: float = 1e-2) -> list[dict[str, Any]]:
    return [{"params": list(parameters), "lr": lr, "name": "all"}]


def steps(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter, count: int) -> None:
    for _ in range(count):
        torch.autograd.backward((p - torch.arange(p.numel()).view_as(p) / 4096).square().sum())
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["name"])
def test_optimizers_take_the_golden_steps(row: dict[str, Any]) -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(8, 128))
    q = torch.nn.Parameter(torch.randn(64))
    target = torch.randn(8, 128)
    assert row["args"] == []
    component = OPTIMIZERS[row["name"]]()
    optimizer = component.build(group(p, q, lr=row["lr"]))
    for step in row["trajectory"]:
        loss = torch.nn.functional.mse_loss(p, target) + q.square().mean()
        assert loss.item() == pytest.approx(step["loss"], rel=1e-6)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        assert p.flatten()[:4].tolist() == pytest.approx(step["p0"], abs=1e-6)
        assert q[:4].tolist() == pytest.approx(step["q0"], abs=1e-6)


def test_state_has_8_bits_above_the_size_and_32_below() -> None:
    for size, dtype in ((4096, torch.uint8), (8192, torch.float32)):
        p = torch.nn.Parameter(torch.randn(48, 128))
        optimizer = OPTIMIZERS["AdamW8bit"](min_8bit_size=size).build(group(p))
        steps(optimizer, p, 1)
        assert optimizer.state[p]["state1"].dtype == dtype


def test_decay_of_adam_is_that_of_adamw() -> None:
    results = []
    for name in ("Adam8bit", "AdamW8bit"):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 6144).view(48, 128))
        optimizer = OPTIMIZERS[name](learning_rate=1e-2, weight_decay=0.5).build(group(p))
        steps(optimizer, p, 3)
        results.append(p.detach())
    assert torch.equal(*results)


def test_groups_keep_their_rates_and_names() -> None:
    groups = [*group(torch.nn.Parameter(torch.ones(4)), lr=1e-3)]
    groups += group(torch.nn.Parameter(torch.ones(4)), lr=1e-5)
    groups[1]["name"] = "text"
    optimizer = OPTIMIZERS["Lion8bit"](learning_rate=1.0).build(groups)
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [("all", 1e-3), ("text", 1e-5)]


def test_entry_point_registers_every_optimizer() -> None:
    (entry,) = entry_points(group="sdxl_train", name="bitsandbytes")
    assert entry.load().register_optimizers().keys() == OPTIMIZERS.keys()


def test_importing_the_plugin_imports_neither_torch_nor_bitsandbytes() -> None:
    code = (
        "import sdxl_train_bitsandbytes, sys; "
        "print([name for name in ('torch', 'bitsandbytes') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"
