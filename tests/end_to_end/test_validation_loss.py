"""The loss on held-out images: the mean it says it is, repeatable, and unnoticed by training."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from sdxl_train.data.batches import Batch
from sdxl_train.loop import Step
from sdxl_train.rng import Streams
from sdxl_train.validation import Validation

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import SameTensors, TrainLora

LISTENER = """
import json
from dataclasses import replace
from sdxl_train import hookimpl

@hookimpl
def validation_finished(run, result):
    with (run.output_dir / "heard.jsonl").open("a") as file:
        file.write(json.dumps(result.as_json()) + "\\n")
"""


def batch_of(*values: float) -> Batch:
    sizes = torch.zeros(len(values), 2, dtype=torch.int64)
    return Batch(
        pixels=None,
        latents=torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 4, 2, 2),
        captions=[""] * len(values),
        text=None,
        original_size=sizes,
        crop_top_left=sizes,
        target_size=sizes,
        loss_weights=torch.ones(len(values)),
        keys=[str(value) for value in values],
    )


def test_each_image_counts_the_same_and_each_timestep_is_apart() -> None:
    unused = cast("Any", None)
    step = Step(
        timesteps=unused,
        add_noise=lambda latents, noise, timesteps: noise,
        condition=lambda batch: {},
        prepare_step=lambda timesteps: None,
        predict=lambda noisy, timesteps, condition: torch.zeros_like(noisy),
        target=lambda latents, noise, timesteps: latents * timesteps.view(-1, 1, 1, 1),
        loss=lambda prediction, target, timesteps: (prediction - target).abs(),
        streams=Streams(0),
        clip=unused,
        optimizer=unused,
        scheduler=unused,
    )
    batches = [batch_of(1.0, 2.0), batch_of(6.0)]
    validation = Validation(step=step, batches=lambda: batches, seed=0, timesteps=(200, 800))
    losses, images = validation.losses()
    assert losses == pytest.approx((200 * 3.0, 800 * 3.0))
    assert images == 3


def test_validation_changes_nothing_and_is_told_recorded_and_repeatable(
    train_lora: TrainLora, same_tensors: SameTensors, tmp_path: Path
) -> None:
    listener = tmp_path / "listener.py"
    listener.write_text(LISTENER, encoding="utf-8")
    common = {"validation_split": 0.6, "network_dropout": 0.1, "max_train_steps": 3}
    bare = train_lora(**common, validate_every_n_epochs=0)
    often = train_lora(**common, validate_every_n_steps=1, plugin=[str(listener)])
    by_epoch = train_lora(**common)  # two steps an epoch
    assert same_tensors(bare.tensors, often.tensors)
    assert bare.result.validations == []
    results = often.result.validations
    assert [(result.step, result.epoch) for result in results] == [(1, 1), (2, 1), (3, 2)]
    assert [replace(result, due=()) for result in by_epoch.result.validations] == [
        replace(result, due=()) for result in results[1:]
    ]
    assert [result.due for result in results] == [("step",), ("step", "epoch"), ("step", "epoch")]
    assert {result.timesteps for result in results} == {(200, 400, 600, 800)}
    assert len({result.loss for result in results}) == 3
    for result in results:
        assert result.loss == pytest.approx(sum(result.losses) / 4)
    told = [result.as_json() for result in results]
    heard = (often.folder / "heard.jsonl").read_text().splitlines()
    record = json.loads((often.folder / "photo.run.json").read_text())
    assert [json.loads(line) for line in heard] == told
    assert record["results"]["validations"] == told


def test_fewer_batches_and_a_narrow_range_of_timesteps_are_honoured(train_lora: TrainLora) -> None:
    run = train_lora(
        validation_split=0.6,
        max_train_steps=1,
        max_validation_steps=1,
        min_timestep=100,
        max_timestep=200,
    )
    (result,) = run.result.validations
    assert result.timesteps == (120, 140, 160, 180)
    assert result.images < 3


def test_options_without_held_out_images_are_named(
    train_lora: TrainLora, caplog: pytest.LogCaptureFixture
) -> None:
    run = train_lora(max_train_steps=1, validate_every_n_steps=1)
    assert not run.result.validations
    assert "validate_every_n_steps has no effect: no images are held out" in caplog.text
