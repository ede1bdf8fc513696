"""What must not change the weights does not: bit for bit, on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import SameTensors, Trained, TrainLora

STEPS = 7
"""Five steps are an epoch."""

NEUTRAL: dict[str, dict[str, Any]] = {
    "worker processes": {"max_data_loader_n_workers": 2, "persistent_data_loader_workers": True},
    "cached latents": {"cache_latents": True},
    "progress and saves": {"progress": True, "save_every_n_steps": 2, "save_every_n_epochs": 1},
}


@pytest.fixture(scope="module")
def baseline(train_lora: TrainLora) -> Trained:
    """The run that the others are compared with: nothing cached, one process."""
    return train_lora(max_train_steps=STEPS)


@pytest.mark.parametrize("neutral", NEUTRAL)
def test_weights_do_not_depend_on(
    neutral: str, baseline: Trained, train_lora: TrainLora, same_tensors: SameTensors
) -> None:
    other = train_lora(max_train_steps=STEPS, **NEUTRAL[neutral])
    assert same_tensors(other.tensors, baseline.tensors)
    assert other.steps == baseline.steps


def test_single_file_and_folder_of_one_model_train_alike(
    baseline: Trained, train_lora: TrainLora, tiny_folder: Path, same_tensors: SameTensors
) -> None:
    other = train_lora(max_train_steps=STEPS, pretrained_model_name_or_path=str(tiny_folder))
    assert same_tensors(other.tensors, baseline.tensors)


def test_another_seed_gives_other_weights(
    baseline: Trained, train_lora: TrainLora, same_tensors: SameTensors
) -> None:
    other = train_lora(max_train_steps=1, seed=43)
    assert not same_tensors(other.initial, baseline.initial)
    assert other.steps[0]["loss"] != baseline.steps[0]["loss"]


def test_global_random_state_is_not_the_runs_business(
    baseline: Trained, train_lora: TrainLora, same_tensors: SameTensors
) -> None:
    torch.manual_seed(1234)
    other = train_lora(max_train_steps=1)
    assert same_tensors(other.initial, baseline.initial)
    assert other.steps[0] == baseline.steps[0]


def test_cached_text_encodings_change_nothing_but_rounding(train_lora: TrainLora) -> None:
    live, cached = (
        train_lora(
            max_train_steps=STEPS, network_train_unet_only=True, cache_text_encoder_outputs=cache
        )
        for cache in (False, True)
    )
    assert all(name.startswith("lora_unet_") for name in live.tensors)
    losses = [step["loss"] for step in live.steps]
    assert [step["loss"] for step in cached.steps] == pytest.approx(losses, abs=1e-4)


def test_gradient_checkpointing_changes_nothing_even_with_dropout(
    train_lora: TrainLora,
) -> None:
    plain, checkpointed = (
        train_lora(max_train_steps=2, network_dropout=0.5, gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert plain.tensors.keys() == checkpointed.tensors.keys()
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(tensor, checkpointed.tensors[name], rtol=0, atol=1e-6)
