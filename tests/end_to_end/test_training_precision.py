"""Mixed precision, and parts of the model that do not train."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.end_to_end.conftest import TrainLora


def test_bf16_trains_like_fp32_and_saves_fp32(train_lora: TrainLora) -> None:
    exact, mixed = (
        train_lora(mixed_precision=precision, max_train_steps=2) for precision in ("no", "bf16")
    )
    losses = [step["loss"] for step in exact.steps]
    # bf16 has eight bits of precision.
    assert [step["loss"] for step in mixed.steps] == pytest.approx(losses, rel=0.02)
    assert [step["loss"] for step in mixed.steps] != losses
    assert {tensor.dtype for tensor in mixed.tensors.values()} == {torch.float32}
    moved = {
        name for name, tensor in mixed.tensors.items() if (tensor != mixed.initial[name]).any()
    }
    assert {name.split("_")[1] for name in moved} == {"unet", "te1", "te2"}
    assert mixed.metadata["ss_mixed_precision"] == "bf16"


def test_bf16_trains_from_cached_encodings(train_lora: TrainLora) -> None:
    run = train_lora(
        mixed_precision="bf16",
        cache_latents=True,
        cache_text_encoder_outputs=True,
        network_train_unet_only=True,
        max_train_steps=2,
    )
    assert all(name.startswith("lora_unet_") for name in run.tensors)
    assert all(math.isfinite(step["loss"]) for step in run.steps)
    ups = [tensor for name, tensor in run.tensors.items() if name.endswith("lora_up.weight")]
    assert all(bool(tensor.any()) for tensor in ups)


def test_one_text_encoder_alone_trains_and_is_saved_alone(train_lora: TrainLora) -> None:
    run = train_lora(network_train_text_encoder_only=True, text_encoder_lr1=0, max_train_steps=3)
    assert run.tensors
    assert all(name.startswith("lora_te2_") for name in run.tensors)
    ups = {name: t for name, t in run.tensors.items() if name.endswith("lora_up.weight")}
    assert all(bool(tensor.any()) for tensor in ups.values())
    assert {name for step in run.steps for name in step["learning_rates"]} == {"textencoder"}
