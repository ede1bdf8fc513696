"""The loop, driven by a list of batches and lambdas: no host, no files, no command line."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from sdxl_lora_plugins.networks import Lora
from sdxl_train.data.batches import Batch
from sdxl_train.errors import TrainingError
from sdxl_train.loop import Step, StepBatches, train
from sdxl_train.rng import Streams
from sdxl_train.transfer import sent
from sdxl_train.update import Update

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


def taken(
    *, late: bool, spoilt: int = 0, fails: int = 0
) -> tuple[list[tuple[int, float, list[torch.Tensor]]], str, torch.optim.Optimizer]:
    """Each step's number, rate and weights when it is given; how it ended; the optimizer."""
    torch.manual_seed(5)
    model = nn.Conv2d(3, 3, 1)
    optimizer = torch.optim.AdamW(
        [{"params": [*model.parameters()], "name": "all"}], lr=0.1, fused=True
    )
    step = step_of(model, optimizer)
    step.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    if late:
        step.hold_back = lambda finite: setattr(optimizer, "found_inf", (~finite).float())

    def steps() -> Iterator[StepBatches]:
        for number, batch in enumerate(batches(0), start=1):
            if number == fails:
                raise OSError("the disk is gone")
            latents = batch.batches[0].latents
            assert latents is not None
            if number == spoilt:
                batch = replace(
                    batch,
                    batches=[replace(cast("Batch", batch.batches[0]), latents=latents * torch.nan)],
                )
            yield batch

    seen: list[tuple[int, float, list[torch.Tensor]]] = []
    end = "complete"
    try:
        for result in train(steps(), step):
            weights = [parameter.detach().clone() for parameter in model.parameters()]
            seen.append((result.step, float(result.learning_rates["all"]), weights))
    except (TrainingError, OSError) as error:
        end = str(error)
    assert not step.updating
    seen.append(
        (0, float(step.scheduler.get_last_lr()[0]), [p.detach() for p in model.parameters()])
    )
    return seen, end, optimizer


@pytest.mark.parametrize("how", [{}, {"spoilt": 1}, {"spoilt": 4}, {"spoilt": STEPS}, {"fails": 3}])
def test_steps_that_are_checked_late_are_those_that_are_checked_at_once(
    how: dict[str, int],
) -> None:
    (expected, end, one), (found, other_end, two) = (
        taken(late=late, **how) for late in (False, True)
    )
    assert other_end == end
    assert ("step" in end) == ("spoilt" in how)
    assert len(found) == len(expected)
    for (number, rate, weights), (other, other_rate, others) in zip(expected, found, strict=True):
        assert (number, rate) == (other, other_rate)
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    for key, state in one.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, two.state_dict()["state"][key][name])


def test_the_next_gradients_are_there_before_a_step_is_asked_about() -> None:
    order: list[str] = []
    model = nn.Conv2d(3, 3, 1)
    optimizer = torch.optim.AdamW(
        [{"params": [*model.parameters()], "name": "all"}], lr=0.1, fused=True
    )
    step = step_of(model, optimizer)
    step.lap = order.append
    step.hold_back = lambda finite: order.append("held")
    for result in train(batches(4), step, start=4):
        order.append(f"step {result.step}")
    first = ["data", "forward", "backward", "held", "optimizer"]
    assert order == [*first, *first[:3], "step 5", *first[3:], "step 6"]


class Travelling:
    """A tensor as far as its journey is concerned."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.journey: list[str] = []

    def pin_memory(self) -> Travelling:
        self.journey.append("pinned")
        return self

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Travelling:
        self.journey.append(f"to {device}{', nobody waits' if non_blocking else ''}")
        return self


@pytest.mark.parametrize(
    ("device", "pinned", "journey"),
    [
        ("cuda", True, ["pinned", "to cuda, nobody waits"]),
        ("cuda", False, ["to cuda"]),
        ("cpu", True, ["to cpu"]),
    ],
)
def test_only_a_gpu_fetches_by_itself(device: str, pinned: bool, journey: list[str]) -> None:
    tensor: Any = Travelling()
    sent(tensor, torch.device(device), pinned=pinned)
    assert tensor.journey == journey


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"device": "cpu"}, "there is no GPU"),
        ({"check_late": False}, "--check_late is false"),
        ({"optimizer": torch.optim.RMSprop}, "the optimizer cannot hold"),
        ({"fused_backward_pass": True}, "steps in the backward pass"),
        ({"scaler": object()}, "fp16"),
        ({"count": 2}, "processes"),
        ({"reuses_memory": True}, "CUDA graphs"),
        ({"scale_weight_norms": 1.0}, "act twice"),
    ],
)
def test_what_cannot_be_checked_late_is_checked_at_once(
    change: dict[str, Any], reason: str | None
) -> None:
    weight = nn.Parameter(torch.zeros(1))
    bare = change.get("optimizer", lambda params: torch.optim.AdamW(params, fused=True))([weight])
    config: Any = SimpleNamespace(
        training=SimpleNamespace(
            check_late=change.get("check_late", True),
            fused_backward_pass=change.get("fused_backward_pass", False),
            max_grad_norm=1.0,
        ),
        model=SimpleNamespace(reuses_memory=change.get("reuses_memory", False)),
        network=Lora(scale_weight_norms=change.get("scale_weight_norms")),
    )
    accelerator: Any = SimpleNamespace(
        device=torch.device(change.get("device", "cuda")),
        scaler=change.get("scaler"),
        prepare_optimizer=lambda optimizer: optimizer,
    )
    ranks: Any = SimpleNamespace(count=change.get("count", 1))
    why = Update(config, accelerator, ranks, bare, [weight]).why_at_once()
    assert why is None if reason is None else reason in str(why)
