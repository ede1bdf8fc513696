"""Steps inside the backward pass: the same weights, and never two gradients at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdxl_lora_plugins import optimizers
from sdxl_train.fused import FusedBackward

if TYPE_CHECKING:
    from collections.abc import Callable

MAKERS: dict[str, Callable[[], Any]] = {
    "AdamW": optimizers.AdamW,
    "Adafactor": optimizers.Adafactor,
    "Adafactor at a given rate": lambda: optimizers.Adafactor(relative_step=False),
    "RMSprop": optimizers.RMSprop,
    "SGDNesterov": optimizers.SgdNesterov,
}


def model_and_optimizer(
    component: Any,
) -> tuple[torch.nn.Sequential, torch.optim.Optimizer, list[torch.nn.Parameter]]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(4)))
    parameters = list(model.parameters())
    groups = [
        {"params": parameters[:5], "lr": 1e-2, "name": "unet"},
        {"params": parameters[5:], "lr": 1e-3, "name": "text"},
    ]
    return model, component.build(groups), parameters


def backward(model: torch.nn.Module, seed: int) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    torch.autograd.backward((model(x) - x.flip(1)).square().mean())


@pytest.mark.parametrize("name", MAKERS)
def test_fused_steps_give_the_weights_of_joint_ones(name: str) -> None:
    joint, optimizer, parameters = model_and_optimizer(MAKERS[name]())
    fused, inner, others = model_and_optimizer(MAKERS[name]())
    steps = FusedBackward(inner, max_norm=0)
    for seed in range(5):
        backward(joint, seed)
        norm = torch.linalg.vector_norm(
            torch.stack([p.grad.norm() for p in parameters if p.grad is not None])
        )
        optimizer.step()
        optimizer.zero_grad()
        backward(fused, seed)
        assert steps.grad_norm().item() == pytest.approx(norm.item(), rel=1e-6)
        if seed == 2:  # which puts new groups in the place of the old ones
            inner.load_state_dict(inner.state_dict())
    for one, two in zip(parameters, others, strict=True):
        torch.testing.assert_close(one, two)
    assert [len(group["params"]) for group in inner.param_groups] == [5, 3]


def test_no_two_gradients_are_there_at_once() -> None:
    model, optimizer, parameters = model_and_optimizer(optimizers.AdamW())
    held: list[int] = []

    def count(_: torch.Tensor) -> None:
        held.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call]
    FusedBackward(optimizer, max_norm=0)
    backward(model, 0)
    assert max(held) == 6 * 6 * 4  # the largest one, in fp32
    assert all(parameter.grad is None for parameter in parameters)


def test_each_gradient_is_clipped_by_its_own_norm() -> None:
    sgd = optimizers.Sgd()
    model, optimizer, parameters = model_and_optimizer(sgd)
    twin, _, others = model_and_optimizer(sgd)
    FusedBackward(optimizer, max_norm=1e-3)
    backward(model, 0)
    backward(twin, 0)
    rates = [1e-2] * 5 + [1e-3] * 3
    for p, q, rate in zip(parameters, others, rates, strict=True):
        assert q.grad is not None
        norm = q.grad.norm()
        expected = q - rate * q.grad * min(1.0, 1e-3 / (norm.item() + 1e-6))
        torch.testing.assert_close(p, expected)
