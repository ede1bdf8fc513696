"""The Python interface: components as objects, events as functions, a typed result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import PrivateAttr
from safetensors.torch import load_file

import sdxl_train
from sdxl_train import Field, Loss, Noise, Optimizer, Run, RunResult, StepResult, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdxl_train import LossFunction, NoiseSchedule, NoiseTransform
    from tests.end_to_end.conftest import MakeOptions, SameTensors, TrainLora


class Cubic(Loss):
    """The cube of the distance."""

    cubic_scale: float = Field(1.0, gt=0, description="Factor.")

    def build(self, schedule: NoiseSchedule) -> LossFunction:
        return lambda prediction, target, _: self.cubic_scale * (prediction - target).abs() ** 3


class Stripes(Noise):
    """Noise in stripes."""

    stripes: float = Field(0.0, ge=0, description="Strength.")

    def active(self) -> bool:
        return self.stripes > 0

    def build(self, schedule: NoiseSchedule) -> NoiseTransform:
        return lambda noise, *_: noise * (1 + self.stripes)


class SlowSgd(Optimizer):
    """Gradient descent."""

    slowness: float = Field(1.0, ge=1, description="Divides every rate.")

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{**g, "lr": g["lr"] / self.slowness} for g in groups])


class Forgetful(Loss):
    """Keeps something that no option tells."""

    _hidden: list[int] = PrivateAttr(default_factory=list)

    def build(self, schedule: NoiseSchedule) -> LossFunction:
        return lambda prediction, target, _: (prediction - target) ** 2


def test_objects_train_as_registered_components_do(
    options: MakeOptions, train_lora: TrainLora, same_tensors: SameTensors, tmp_path: Path
) -> None:
    given = options()
    result = sdxl_train.train(
        given, components=[Cubic(cubic_scale=2.0), Stripes(stripes=0.5), SlowSgd(slowness=2)]
    )
    registered = train_lora(
        loss_type=f"{__name__}.Cubic",
        cubic_scale=2.0,
        noise=[f"{__name__}.Stripes"],
        stripes=0.5,
        optimizer_type=f"{__name__}.SlowSgd",
        optimizer_args=["slowness=2"],
    )

    assert isinstance(result, RunResult)

    assert same_tensors(load_file(result.files[-1]), registered.tensors)
    record = json.loads(
        (Path(given["output_dir"]) / f"{given['output_name']}.run.json").read_text()
    )
    assert record["options"]["cubic_scale"]["value"] == 2.0
    assert record["options"]["loss_type"]["value"] == "Cubic"


def test_events_are_called_with_the_arguments_they_name(options: MakeOptions) -> None:
    heard: list[object] = []
    sdxl_train.train(
        options(max_train_steps=2),
        events={
            "run_started": lambda run: heard.append(run),
            "step_finished": lambda step: heard.append(step),
            "run_finished": lambda error: heard.append(error),
        },
    )

    assert [type(item) for item in heard] == [Run, StepResult, StepResult, type(None)]


def test_plan_takes_objects(options: MakeOptions) -> None:
    plan = sdxl_train.plan(options(), components=[Cubic()])

    assert plan.options["loss_type"] == {
        "value": "Cubic",
        "origin": "component Cubic",
    }


def test_mistakes_with_objects_are_named_all_at_once(options: MakeOptions) -> None:
    with pytest.raises(UserError) as caught:
        sdxl_train.train(
            options(),
            components=[Cubic(), SlowSgd(), Cubic(), Forgetful(), "noise"],  # type: ignore[list-item]
            events={"step_finish": print, "run_started": lambda step: None},
        )

    text = str(caught.value)
    assert "components: Cubic: a run has one loss, and Cubic is given already" in text
    assert "components: Forgetful: a run has one loss" in text
    assert "components: str: is no component: 'noise'" in text
    assert "events: step_finish: is no event; did you mean step_finished?" in text
    assert "events: run_started: hook run_started has no argument 'step'" in text


def test_an_object_that_its_options_do_not_tell_is_refused(options: MakeOptions) -> None:
    forgetful = Forgetful()
    forgetful._hidden.append(1)

    with pytest.raises(UserError, match="hold all of it in options"):
        sdxl_train.plan(options(), components=[forgetful])


def test_an_option_set_by_an_object_and_by_name_is_refused(options: MakeOptions) -> None:
    with pytest.raises(UserError, match="option loss_type: is set by component Cubic too"):
        sdxl_train.plan(options(loss_type="l1"), components=[Cubic()])


def test_a_run_goes_on_with_the_same_objects_only(options: MakeOptions) -> None:
    given = options(max_train_steps=2, save_state=True)
    sdxl_train.train(given, components=[Cubic(cubic_scale=2.0)])
    longer = {**given, "max_train_steps": 4, "resume": "latest"}

    with pytest.raises(UserError, match=r"component Cubic.cubic_scale: is 3.0 now, 2.0 in"):
        sdxl_train.train(longer, components=[Cubic(cubic_scale=3.0)])
    assert sdxl_train.train(longer, components=[Cubic(cubic_scale=2.0)]).steps == 4


def test_the_documented_program_runs(
    options: MakeOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "python.md"
    code = page.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    given = options()
    for written, here in {
        "sd_xl_base_1.0.safetensors": given["pretrained_model_name_or_path"],
        '"images"': repr(given["train_data_dir"]),
        '"output"': repr(str(tmp_path)),
        '"resolution": 1024': '"resolution": 64',
        '"max_train_steps": 100': '"max_train_steps": 2',
    }.items():
        assert written in code
        code = code.replace(written, here)
    exec(compile(code, str(page), "exec"), {"__name__": __name__})

    assert str(tmp_path / "cubic.safetensors") in capsys.readouterr().out
