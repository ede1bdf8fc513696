"""Weights of 16 bits that learn from small updates: rounding at random, steps in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdxl_train.rounding import WideSteps, round_at_random


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_goes_to_a_neighbour_and_is_right_on_average(dtype: torch.dtype) -> None:
    for value in (0.3, -0.3, 1.001, -70.3, 0.000123):
        exact = torch.full((200_000,), value)
        rounded = round_at_random(exact, dtype, generator())
        assert rounded.dtype == dtype
        levels = torch.tensor(sorted(set(rounded.tolist())))
        nearest = exact[0].to(dtype).float()
        assert nearest in levels
        assert len(levels) == 2
        gap = float(levels[1] - levels[0])
        assert float(levels[0]) < float(exact[0]) < float(levels[1])
        # The deviation of one rounding is at most half the gap.
        assert float(rounded.double().mean()) == pytest.approx(
            float(exact[0]), abs=4 * gap / 2 / len(exact) ** 0.5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_type_can_hold_stays_bit_for_bit(dtype: torch.dtype) -> None:
    held = torch.randn(10_000, generator=generator()).to(dtype)
    held[:4] = torch.tensor([0.0, -0.0, 1.0, -2.0])
    assert torch.equal(round_at_random(held.float(), dtype, generator(1)), held)


def test_updates_too_small_for_bf16_add_up() -> None:
    """1 + 1e-4 is 1 in bf16, whose next number is 1.0078; a hundred of them are 1.01 on average."""
    weight = nn.Parameter(torch.ones(20_000))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    draws = generator()
    WideSteps(optimizer, torch.bfloat16, lambda _: draws)
    for _ in range(100):
        weight.grad = torch.full_like(weight, -1.0)
        optimizer.step()
        assert weight.dtype == torch.bfloat16
    assert float(weight.detach().double().mean()) == pytest.approx(1.01, abs=5e-4)

    rounded_to_nearest = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(100):
        rounded_to_nearest += 1e-4
    assert rounded_to_nearest.item() == 1


def test_optimizer_computes_in_fp32_and_keeps_its_state_so() -> None:
    weight = nn.Parameter(torch.randn(50, generator=generator()).to(torch.bfloat16).float())
    twin = nn.Parameter(weight.detach().clone())
    optimizer, reference = (torch.optim.AdamW([p], lr=1e-2) for p in (weight, twin))
    draws = generator(1)
    WideSteps(optimizer, torch.bfloat16, lambda _: draws)
    gradient = torch.randn(50, generator=generator(2)).to(torch.bfloat16)
    weight.grad, twin.grad = gradient.clone(), gradient.float()
    optimizer.step()
    reference.step()
    assert {value.dtype for value in optimizer.state[weight].values()} == {torch.float32}
    for name, value in reference.state[twin].items():
        assert torch.equal(optimizer.state[weight][name], value)
    # Rounded up or down by less than one step of bf16, a 128th.
    torch.testing.assert_close(weight.float(), twin.detach(), rtol=1 / 128, atol=0)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    trained, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([trained, idle], lr=0.5)
    indices: list[int] = []

    def draws(index: int) -> torch.Generator:
        indices.append(index)
        return generator()

    wide = WideSteps(optimizer, torch.bfloat16, draws)
    trained.grad = torch.ones_like(trained)
    wide.widen()
    assert (trained.dtype, idle.dtype) == (torch.float32, torch.bfloat16)
    optimizer.step()
    assert (trained.dtype, idle.dtype) == (torch.bfloat16, torch.bfloat16)
    assert trained.tolist() == [0.5] * 3
    assert indices == [0]


def test_a_step_that_is_skipped_leaves_the_weights_as_they_were() -> None:
    weight = nn.Parameter(torch.randn(100, generator=generator()))
    wide = WideSteps(torch.optim.SGD([weight], lr=1), torch.float16, lambda _: generator())
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, float("inf"))
    wide.widen()
    wide.narrow()
    assert torch.equal(weight, before)
    assert weight.dtype == torch.float16
