"""The average of the weights: its formula, its files, and that a resumed run goes on with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import sdxl_train
from sdxl_train import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.end_to_end.conftest import MakeOptions, SameTensors, Trained, TrainLora

DECAY = 0.25
"""Above (1 + t) / (10 + t) for the first step only."""


@pytest.fixture(scope="module")
def averaged(train_lora: TrainLora) -> Callable[..., Trained]:
    def train(**changes: Any) -> Trained:
        return train_lora(ema_decay=DECAY, save_every_n_steps=1, save_state=True, **changes)

    return train


@pytest.fixture(scope="module")
def whole(averaged: Callable[..., Trained]) -> Trained:
    return averaged()


def test_averages_lie_beside_the_networks_and_follow_the_formula(whole: Trained) -> None:
    expected = {name: tensor.double() for name, tensor in whole.initial.items()}
    stems = ["photo-step00000001", "photo-step00000002", "photo-step00000003", "photo"]
    for step, stem in enumerate(stems, start=1):
        decay = min(DECAY, (1 + step) / (10 + step))
        weights = load_file(whole.folder / f"{stem}.safetensors")
        average = load_file(whole.folder / f"{stem}-ema.safetensors")
        for name, tensor in weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
            torch.testing.assert_close(average[name].double(), expected[name], rtol=1e-5, atol=1e-8)
    assert [path.name for path in whole.result.files[-2:]] == [
        "photo-ema.safetensors",
        "photo.safetensors",
    ]


def test_the_average_changes_no_weight(
    whole: Trained, train_lora: TrainLora, same_tensors: SameTensors
) -> None:
    assert same_tensors(whole.tensors, train_lora().tensors)


def test_a_resumed_run_goes_on_with_the_average(
    whole: Trained, averaged: Callable[..., Trained], same_tensors: SameTensors
) -> None:
    half = averaged(max_train_steps=2)
    resumed = averaged(resume=str(half.folder / "photo-state"))
    files = [run.folder / "photo-ema.safetensors" for run in (whole, resumed)]
    assert same_tensors(load_file(files[0]), load_file(files[1]))


def test_old_averages_go_with_their_networks(averaged: Callable[..., Trained]) -> None:
    run = averaged(save_last_n_steps=1, max_train_steps=3)
    left = sorted(path.name for path in run.folder.glob("photo*.safetensors"))
    stems = ("photo-ema", "photo-step00000003-ema", "photo-step00000003", "photo")
    assert left == sorted(f"{stem}.safetensors" for stem in stems)


def test_averages_of_averages_are_refused(options: MakeOptions) -> None:
    with pytest.raises(UserError, match=r"ema_decay, .*optimizer_type.*averages the weights"):
        sdxl_train.plan(options(ema_decay=0.9, optimizer_type="AdamWScheduleFree"))
