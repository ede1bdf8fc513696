"""Mixed precision, and parts of the model that do not train."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

import sdxl_train
from sdxl_train import UserError

if TYPE_CHECKING:
    from tests.end_to_end.conftest import MakeOptions, SameTensors, Trained, TrainLora


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


FULL_BF16 = {"mixed_precision": "bf16", "full_bf16": True}


@pytest.fixture(scope="module")
def full(train_lora: TrainLora) -> Trained:
    return train_lora(**FULL_BF16)


def test_full_bf16_keeps_what_trains_in_bf16_and_saves_it_so(
    train_lora: TrainLora, full: Trained
) -> None:
    mixed = train_lora(mixed_precision="bf16")
    assert {tensor.dtype for tensor in full.tensors.values()} == {torch.bfloat16}
    assert [step["loss"] for step in full.steps] == pytest.approx(
        [step["loss"] for step in mixed.steps], rel=0.02
    )
    # Adam's steps are at most 1e-3, and may go either way where a gradient is nearly 0.
    for name, tensor in full.tensors.items():
        torch.testing.assert_close(tensor.float(), mixed.tensors[name], rtol=0.05, atol=8e-3)
    plans = [sdxl_train.plan(run.options).memory for run in (mixed, full)]
    assert plans[1]["network_bytes"] * 2 == plans[0]["network_bytes"]
    assert plans[1]["gradient_bytes"] * 2 == plans[0]["gradient_bytes"]


def test_full_bf16_learns_at_rates_that_bf16_alone_would_round_away(train_lora: TrainLora) -> None:
    """A LoRA's down weights near 0.1 have neighbours 5e-4 apart; Adam's first steps are 1e-5."""
    run = train_lora(**FULL_BF16, learning_rate=1e-5, max_train_steps=3)
    downs = [name for name in run.tensors if name.endswith("lora_down.weight")]
    initial = torch.cat([run.initial[name].float().flatten() for name in downs])
    final = torch.cat([run.tensors[name].float().flatten() for name in downs])
    assert bool((initial != final).any())


def test_full_bf16_resumes_exactly(
    train_lora: TrainLora, full: Trained, same_tensors: SameTensors
) -> None:
    half = train_lora(**FULL_BF16, max_train_steps=2, save_state=True)
    resumed = train_lora(**FULL_BF16, resume=str(half.folder / "photo-state"))
    assert same_tensors(full.tensors, resumed.tensors)


@pytest.mark.parametrize(("name", "needed"), [("full_bf16", "bf16"), ("full_fp16", "fp16")])
def test_full_precision_needs_the_mixed_one(options: MakeOptions, name: str, needed: str) -> None:
    with pytest.raises(UserError, match=f"{name}: needs --mixed_precision {needed}"):
        sdxl_train.plan(options(**{name: True}))


@pytest.fixture(scope="module")
def exact(train_lora: TrainLora) -> Trained:
    return train_lora(fp8_base=False)


@pytest.mark.parametrize(
    "chosen",
    [{"fp8_base": True}, {"base_quantization": "fp8-matmul"}, {"base_quantization": "nf4"}],
)
def test_a_base_in_8_bits_trains_nearly_as_the_exact_one(
    chosen: dict[str, Any], exact: Trained, train_lora: TrainLora
) -> None:
    stored = train_lora(**chosen)
    losses = [step["loss"] for step in exact.steps]
    assert [step["loss"] for step in stored.steps] == pytest.approx(losses, rel=0.1)
    assert [step["loss"] for step in stored.steps] != losses
    assert stored.tensors.keys() == exact.tensors.keys()
    assert stored.metadata["ss_fp8_base"] == str("fp8_base" in chosen)
    plans = [sdxl_train.plan(run.options).memory for run in (exact, stored)]
    for part in ("denoiser_bytes", "text_encoder_bytes"):
        assert plans[1][part] < plans[0][part]
