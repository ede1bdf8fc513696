"""torch's optimizers: sd-scripts' trajectories, and the defaults of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdxl_lora_plugins import register_optimizers
from sdxl_train.options import Setting, Words, validate

if TYPE_CHECKING:
    from collections.abc import Callable

OPTIMIZERS: dict[str, Any] = dict(register_optimizers())


@pytest.mark.parametrize("name", ["AdamW", "SGDNesterov", "torch.optim.RAdam", "Adafactor"])
def test_optimizers_take_the_golden_steps(name: str, golden: Callable[[str], Any]) -> None:
    rows = [row for row in golden("optimizers")["runs"] if row["name"] == name]
    assert rows
    for row in rows:
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(8, 128))
        q = torch.nn.Parameter(torch.randn(64))
        target = torch.randn(8, 128)
        given = {
            key: Setting(value=Words((value,)), place=key, origin="command line")
            for key, _, value in (pair.partition("=") for pair in row["args"])
        }
        problems: list[Any] = []
        component: Any = validate(OPTIMIZERS[name], given, problems)
        assert problems == []
        optimizer = component.build([{"params": [p, q], "lr": row["lr"], "name": "all"}])
        for step in row["trajectory"]:
            loss = torch.nn.functional.mse_loss(p, target) + q.square().mean()
            assert loss.item() == pytest.approx(step["loss"], rel=1e-6)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            assert p.flatten()[:4].tolist() == pytest.approx(step["p0"], abs=1e-6)
            assert q[:4].tolist() == pytest.approx(step["q0"], abs=1e-6)


@pytest.mark.parametrize(
    "name", sorted(n for n in OPTIMIZERS if n.startswith("torch.") and "Muon" not in n)
)
def test_defaults_are_those_of_torch_and_a_step_descends(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(4, 4))
    groups = [{"params": [p], "lr": 1e-2, "name": "unet"}]
    optimizer = OPTIMIZERS[name](learning_rate=1e-3).build(groups)
    theirs = getattr(torch.optim, name.rpartition(".")[2])([torch.nn.Parameter(torch.ones(1))])
    settled = {key for key in theirs.defaults if key not in ("lr", "fused")}
    assert {key: optimizer.defaults[key] for key in settled} == {
        key: theirs.defaults[key] for key in settled
    }
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2]
    torch.autograd.backward(p.square().sum())
    optimizer.step()
    assert bool((p < 1).all())
