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


FUSING = ["AdamW", "Adam", "Adagrad", "SGD", "SGDNesterov"]
OTHERS = ["NAdam", "RAdam", "Adamax", "Adadelta", "RMSprop"]


def after_steps(name: str, **options: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The weights after some steps, and how the optimizer takes them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 8), (8,), (4, 8, 3, 3)]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    # As beside a model whose convolutions lie so.
    weights[2].data = weights[2].data.to(memory_format=torch.channels_last)
    optimizer = register_optimizers()[name](learning_rate=1e-2, **options).build(
        [{"params": weights[:1], "lr": 1e-2, "name": "a"}, {"params": weights[1:], "lr": 1e-3}]
    )
    for _ in range(6):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(
                memory_format=torch.channels_last if weight.ndim == 4 else torch.preserve_format
            )
        optimizer.step()
    return [weight.detach() for weight in weights], optimizer.param_groups[0]


@pytest.mark.parametrize("name", [*FUSING, *OTHERS])
@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}])
def test_every_way_to_compute_an_update_gives_the_same(name: str, options: dict[str, bool]) -> None:
    expected, how = after_steps(name)
    assert how.get("fused", False) is (name in FUSING)
    found, other = after_steps(name, **options, **({"fused": False} if name in FUSING else {}))
    assert not other.get("fused")
    assert other["foreach"] is options["foreach"]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_foreach_by_itself_turns_the_kernel_off() -> None:
    _, how = after_steps("AdamW", foreach=True)
    assert not how["fused"]


def test_a_kernel_is_not_asked_for_where_there_is_none() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, device="meta"))
    groups = [{"params": [weight], "lr": 1.0, "name": "all"}]
    assert register_optimizers()["AdamW"]().build(groups).param_groups[0]["fused"] is False
