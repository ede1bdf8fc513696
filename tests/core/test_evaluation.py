"""Training stands still while a run is looked at, and goes on as if nobody had looked."""

from __future__ import annotations

import random
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from sdxl_train.evaluation import Evaluation

if TYPE_CHECKING:
    from sdxl_train.assembly import Assembly


class Averaging(torch.optim.SGD):
    """Trains at ``w + 1/3`` and hands out ``w``: a swap that rounds, back and forth."""

    def train(self) -> None:
        self._move(1 / 3)

    def eval(self) -> None:
        self._move(-1 / 3)

    @torch.no_grad()
    def _move(self, by: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(by)


class Stage:
    """A model of a dropout layer and a network of another, with weights that round."""

    def __init__(self, *, swaps_weights: bool = True) -> None:
        self.denoiser = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.encoder = nn.Sequential(nn.Dropout(0.5)).eval()
        self.delta = nn.Dropout(0.5)
        self.weights = nn.Parameter(torch.rand(100))
        self.adapter = SimpleNamespace(multiplier=1.0, modules=lambda: [self.delta])
        self.optimizer = Averaging([self.weights], lr=0.1)
        assembly = SimpleNamespace(
            model=SimpleNamespace(denoiser=self.denoiser, text_encoders=(self.encoder,)),
            adapter=self.adapter,
            parameters=[self.weights],
        )
        self.evaluation = Evaluation(
            cast("Assembly", assembly),
            self.optimizer,
            swaps_weights=swaps_weights,
            autocast=nullcontext,
        )

    def modes(self) -> list[bool]:
        roots: list[nn.Module] = [self.denoiser, self.encoder, self.delta]
        return [module.training for root in roots for module in root.modules()]


def test_nothing_is_dropped_and_no_gradient_recorded_in_a_pause() -> None:
    stage = Stage()
    with stage.evaluation.pause():
        assert not any(stage.modes())
        assert not (stage.weights * 2).requires_grad


def test_modes_and_multiplier_return_as_they_were() -> None:
    stage = Stage()
    stage.denoiser[1].eval()
    before = stage.modes()
    assert any(before)
    assert not all(before)
    with stage.evaluation.pause():
        stage.adapter.multiplier = 0.5
        stage.denoiser.train()
    assert stage.modes() == before
    assert stage.adapter.multiplier == 1.0


def test_a_swap_that_rounds_gives_every_bit_back() -> None:
    stage = Stage()
    before = stage.weights.detach().clone()
    with stage.evaluation.pause():
        inside = stage.weights.detach().clone()
    assert torch.equal(inside, before - 1 / 3)
    assert torch.equal(stage.weights, before)
    # The swap alone would not have: this test can fail.
    assert not torch.equal(inside + 1 / 3, before)


def test_a_pause_within_a_pause_swaps_only_once() -> None:
    stage = Stage()
    before = stage.weights.detach().clone()
    with stage.evaluation.pause():
        with stage.evaluation.pause(), stage.evaluation.final_weights():
            assert torch.equal(stage.weights, before - 1 / 3)
        assert torch.equal(stage.weights, before - 1 / 3)
        assert not any(stage.modes())
    assert torch.equal(stage.weights, before)


def test_an_optimizer_without_the_trait_is_left_alone() -> None:
    stage = Stage(swaps_weights=False)
    before = stage.weights.detach().clone()
    with stage.evaluation.pause():
        assert torch.equal(stage.weights, before)


def test_the_global_random_states_go_on_as_before() -> None:
    def draws() -> list[Any]:
        return [torch.rand(1).item(), np.random.random(), random.random()]

    def seed(number: int) -> None:
        torch.manual_seed(number)
        np.random.seed(number)
        random.seed(number)

    stage = Stage()
    seed(1)
    undisturbed = draws()
    seed(1)
    with stage.evaluation.pause():
        seed(2)
    assert draws() == undisturbed


def test_an_error_in_a_pause_leaves_training_as_it_was() -> None:
    stage = Stage()
    before, modes = stage.weights.detach().clone(), stage.modes()
    with pytest.raises(RuntimeError, match="sampler"), stage.evaluation.pause():
        raise RuntimeError("sampler")
    assert torch.equal(stage.weights, before)
    assert stage.modes() == modes
