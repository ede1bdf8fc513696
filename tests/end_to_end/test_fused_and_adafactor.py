"""Runs that step inside the backward pass, and Adafactor with its own rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import sdxl_train
from sdxl_train import UserError

if TYPE_CHECKING:
    from tests.end_to_end.conftest import MakeOptions, SameTensors, TrainLora

ADAFACTOR = {"optimizer_type": "adafactor", "learning_rate": None}
GIVEN_RATE = {
    **ADAFACTOR,
    "optimizer_args": ["relative_step=False", "scale_parameter=False"],
    "learning_rate": 1e-3,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 2,
    "max_grad_norm": 0,
}


@pytest.mark.parametrize("given", [ADAFACTOR, GIVEN_RATE], ids=["relative", "given rate"])
def test_fused_training_gives_the_weights_of_joint_steps(
    train_lora: TrainLora, given: dict[str, Any]
) -> None:
    options = {**given, "max_grad_norm": 0}
    joint = train_lora(**options)
    fused = train_lora(**options, fused_backward_pass=True)
    assert [s["loss"] for s in fused.steps] == pytest.approx(
        [s["loss"] for s in joint.steps], rel=1e-5
    )
    assert [s["grad_norm"] for s in fused.steps] == pytest.approx(
        [s["grad_norm"] for s in joint.steps], rel=1e-4
    )
    for name, tensor in joint.tensors.items():
        torch.testing.assert_close(fused.tensors[name], tensor, rtol=1e-3, atol=1e-5)


def test_fused_training_resumes_exactly(train_lora: TrainLora, same_tensors: SameTensors) -> None:
    options: dict[str, Any] = {**ADAFACTOR, "fused_backward_pass": True, "save_state": True}
    whole = train_lora(**options)
    half = train_lora(**options, max_train_steps=2)
    resumed = train_lora(**options, resume=str(half.folder / "photo-state"))
    assert same_tensors(resumed.tensors, whole.tensors)


def test_adafactor_sets_and_records_its_own_rates(train_lora: TrainLora) -> None:
    """min(0.01, 1 / sqrt(step)) times max(0.001, root mean square of the weight)."""
    run = train_lora(**ADAFACTOR, unet_lr=5.0, optimizer_args=["scale_parameter=False"])
    assert [next(iter(s["learning_rates"].values())) for s in run.steps] == [2e-6, *[0.01] * 3]
    recorded = {name: run.metadata[f"ss_{name}"] for name in ("learning_rate", "unet_lr")}
    assert recorded == {"learning_rate": "None", "unet_lr": "None"}
    assert run.metadata["ss_lr_scheduler"] == "adafactor:2e-06"


def test_what_does_not_go_with_fused_steps_is_refused_at_once(options: MakeOptions) -> None:
    chosen = options(
        fused_backward_pass=True,
        gradient_accumulation_steps=2,
        optimizer_type="Prodigy",
        learning_rate=1.0,
        mixed_precision="fp16",
    )
    with pytest.raises(UserError) as caught:
        sdxl_train.plan(chosen)
    fused = [p for p in caught.value.problems if p.place.endswith("fused_backward_pass")]
    messages = " ".join(problem.message for problem in fused)
    assert len(fused) == 3
    for named in ("optimizer_type Prodigy", "gradient_accumulation_steps 2", "fp16"):
        assert named in messages


def test_plan_counts_the_gradients_that_are_there_at_once(options: MakeOptions) -> None:
    joint = sdxl_train.plan(options(**GIVEN_RATE)).memory
    fused = sdxl_train.plan(options(**GIVEN_RATE, fused_backward_pass=True)).memory
    assert joint["gradient_bytes"] == joint["network_bytes"] == fused["network_bytes"]
    # The largest factor: of the GEGLU, which has 2 * 4 * 64 outputs, of rank 4, in fp32.
    assert fused["gradient_bytes"] == 2 * 4 * 64 * 4 * 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr_scheduler": "adafactor"}, "optimizer_type"),
        ({**GIVEN_RATE, "lr_scheduler": "adafactor", "lr_warmup_steps": 0}, "optimizer_type"),
        ({**ADAFACTOR, "lr_scheduler": "linear", "lr_warmup_steps": 1}, "lr_warmup_steps"),
        ({"use_8bit_adam": True, "optimizer_type": "AdamW"}, "use_8bit_adam, option optim"),
    ],
)
def test_rates_that_cannot_act_are_refused(
    options: MakeOptions, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        sdxl_train.plan(options(**changes))


@pytest.mark.parametrize(
    ("changes", "kind", "name"),
    [
        ({"use_8bit_adam": True}, "optimizer_type", "AdamW8bit"),
        ({"use_lion_optimizer": True}, "optimizer_type", "Lion"),
        (
            {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler": "linear"},
            "lr_scheduler",
            "torch.optim.lr_scheduler.CosineAnnealingLR",
        ),
    ],
)
def test_other_spellings_choose_the_component(
    options: MakeOptions, changes: dict[str, Any], kind: str, name: str
) -> None:
    plan = sdxl_train.plan(options(**changes))
    assert plan.options[kind]["value"] == name
    idle = "option lr_scheduler has no effect: option lr_scheduler_type takes precedence"
    assert (idle in plan.warnings) == ("lr_scheduler" in changes)
