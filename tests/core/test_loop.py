"""The loop, driven by a list of batches and lambdas: no host, no files, no command line."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from sdxl_train.data.batches import Batch
from sdxl_train.loop import Step, StepBatches, train
from sdxl_train.rng import Streams

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 6
LATENTS = torch.randn(STEPS, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def batches(first: int) -> list[StepBatches]:
    nothing = torch.zeros(2, 2, dtype=torch.int64)
    return [
        StepBatches(
            epoch=1,
            keys=("a", "b"),
            batches=[
                Batch(
                    pixels=None,
                    latents=latents,
                    captions=["", ""],
                    text=None,
                    original_size=nothing,
                    crop_top_left=nothing,
                    target_size=nothing,
                    loss_weights=torch.ones(2),
                    keys=["a", "b"],
                )
            ],
        )
        for latents in LATENTS[first:]
    ]


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    return Step(
        timesteps=lambda n, generator: cast(
            "torch.LongTensor", torch.randint(0, 1000, (n,), generator=generator)
        ),
        add_noise=lambda latents, noise, timesteps: latents + noise,
        condition=lambda batch: {},
        prepare_step=lambda timesteps: None,
        predict=lambda noisy, timesteps, condition: model(noisy),
        target=lambda latents, noise, timesteps: noise,
        loss=lambda prediction, target, timesteps: (prediction - target) ** 2,
        streams=Streams(seed=1),
        clip=lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
    )


class Restless(torch.optim.SGD):
    """Draws from a generator that belongs to nobody."""

    draw: Callable[[], float]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(self.draw(), alpha=0.01)


@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.random, lambda: torch.rand(()).item(), lambda: 0.0],
    ids=["python", "numpy", "torch", "none"],
)
def test_a_step_depends_on_weights_and_its_number_only(draw: Callable[[], float]) -> None:
    def run(weights: dict[str, Any] | None, first: int) -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.5), nn.Conv2d(8, 3, 1))
        if weights is not None:
            model.load_state_dict(weights)
        optimizer = Restless([{"params": [*model.parameters()], "name": "all"}], lr=0.1)
        optimizer.draw = draw
        seen: list[dict[str, torch.Tensor]] = []
        for result in train(batches(first), step_of(model, optimizer), start=first):
            assert result.step == first + len(seen) + 1
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
            # Somebody who looks at the run draws, too.
            draw()
        return seen

    straight = run(None, 0)
    resumed = run(straight[2], 3)

    assert len(resumed) == 3
    for name, value in straight[-1].items():
        assert torch.equal(value, resumed[-1][name])
