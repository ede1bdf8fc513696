"""AdamW against the trajectory that sd-scripts' optimizer took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdxl_lora_plugins import register_optimizers
from sdxl_train.options import Setting, Words, validate

if TYPE_CHECKING:
    from collections.abc import Callable


def test_adamw_takes_the_golden_steps(golden: Callable[[str], Any]) -> None:
    rows = [row for row in golden("optimizers")["runs"] if row["name"].lower() == "adamw"]
    assert len(rows) >= 2
    for row in rows:
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(8, 128))
        q = torch.nn.Parameter(torch.randn(64))
        target = torch.randn(8, 128)
        given = {
            name: Setting(value=Words((value,)), place=name, origin="command line")
            for name, _, value in (pair.partition("=") for pair in row["args"])
        }
        found: list[Any] = []
        adamw: Any = validate(register_optimizers()["AdamW"], given, found)
        assert found == []
        optimizer = adamw.build([{"params": [p, q], "lr": row["lr"], "name": "all"}])
        for key in ("betas", "eps", "weight_decay", "amsgrad"):
            assert optimizer.defaults[key] == pytest.approx(
                tuple(row["defaults"][key]) if key == "betas" else row["defaults"][key]
            )
        for step in row["trajectory"]:
            loss = torch.nn.functional.mse_loss(p, target) + q.square().mean()
            assert loss.item() == pytest.approx(step["loss"], rel=1e-6)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert p.flatten()[:4].tolist() == pytest.approx(step["p0"], abs=1e-6)
            assert q[:4].tolist() == pytest.approx(step["q0"], abs=1e-6)


def test_adamw_keeps_the_rate_of_each_group() -> None:
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate, "name": str(rate)}
        for rate in (1e-3, 1e-4)
    ]
    optimizer = register_optimizers()["AdamW"](learning_rate=1e-2).build(groups)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4]
    assert [group["name"] for group in optimizer.param_groups] == ["0.001", "0.0001"]
