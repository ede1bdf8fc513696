"""States that are none, moved, edited, of another plugin, or from a clock that lies.

The numbers are those of docs/bad-inputs.md. What a resumed run computes is in test_resume.py.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from sdxl_train import UserError
from sdxl_train.state import SCHEMA_VERSION

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import Planned, SameTensors, Trained, TrainLora

COUNTING = '''
"""Observers that keep something in the states of a run."""
import torch
from sdxl_train import Field, Observer, hookimpl


class Counter(Observer):
    """Counts the steps of all sessions of a run."""

    count_steps: bool = Field(False, description="Count.")

    def active(self):
        return self.count_steps

    def build(self, run):
        class Listener:
            def __init__(self):
                self.steps = 0
                self.sum = torch.zeros(2)

            def step_finished(self, step):
                self.steps += 1
                self.sum += torch.tensor([1.0, step.step])

            def run_finished(self, run):
                text = f"{self.steps} {self.sum.tolist()}"
                (run.output_dir / "counted.txt").write_text(text)

            def state_dict(self):
                return {"steps": self.steps, "sum": self.sum, "best": self.sum / 0}

            def load_state_dict(self, state):
                self.steps, self.sum = state["steps"], state["sum"]

        return Listener()


@hookimpl
def register_observers():
    return {"counter": Counter}
'''

QUICK = {"lr_scheduler": "constant", "save_state": True}


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "counting.py"
    path.write_text(COUNTING, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def first(train_lora: TrainLora) -> Trained:
    """Two steps with a state after each. Not to be written to."""
    return train_lora(**QUICK, save_every_n_steps=1, max_train_steps=2)


def test_what_is_no_state_names_those_nearby_90(
    first: Trained, planned: Planned, tmp_path: Path
) -> None:
    nearby = str(first.folder / "photo-step00000001-state")
    for wrong, fault in (
        (first.path, "is a file, no state's folder"),
        (first.folder, "is no complete state: it has no state.json"),
        (first.folder / "photo-stat", "does not exist"),
    ):
        code, text = planned(["--resume", str(wrong)])
        assert code == 2
        assert fault in text
        assert nearby in text
    code, text = planned(["--resume", str(tmp_path)])
    assert code == 2
    assert "states here" not in text


def test_a_state_that_lacks_a_file_is_told_before_the_start_92(
    first: Trained, planned: Planned, tmp_path: Path
) -> None:
    state = shutil.copytree(first.folder / "photo-step00000001-state", tmp_path / "photo-state")
    (state / "optimizer.safetensors").unlink()
    code, text = planned(["--resume", str(state)], lr_scheduler="constant", max_train_steps=3)
    assert code == 2
    assert "is no complete state: it has no optimizer.safetensors" in text
    assert "states here" not in text
    reset = ["--resume", str(state), "--reset_optimizer"]
    _, text = planned(reset, lr_scheduler="constant", max_train_steps=3)
    assert "is no complete state" not in text  # for its weights are there


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "is not JSON"),
        ("[1, 2]", "has schema version None"),
        ('{"schema_version": %d}', "is corrupt"),
        ('{"schema_version": %d, "step": "many"}', "is corrupt: step"),
    ],
)
def test_an_edited_manifest_is_told_92(
    content: str, fault: str, first: Trained, planned: Planned, tmp_path: Path
) -> None:
    state = shutil.copytree(first.folder / "photo-state", tmp_path / "photo-state")
    content = content.replace("%d", str(SCHEMA_VERSION))
    (state / "state.json").write_text(content, encoding="utf-8")
    code, text = planned(["--resume", str(state)])
    assert code == 2
    assert fault in text
    # The newest complete state is another one, or there is none.
    assert planned(["--resume", "latest", "--output_dir", str(tmp_path)])[0] == 0


def test_a_state_of_more_processes_goes_on_and_says_so_97(
    first: Trained, planned: Planned, tmp_path: Path
) -> None:
    state = shutil.copytree(first.folder / "photo-state", tmp_path / "photo-state")
    manifest = json.loads((state / "state.json").read_text(encoding="utf-8"))
    changed = json.dumps({**manifest, "processes": 2, "plugins": {}})
    (state / "state.json").write_text(changed, encoding="utf-8")
    code, text = planned(["--resume", str(state)], lr_scheduler="constant", max_train_steps=3)
    assert code == 0, text
    assert "for each of 2 processes" in text
    assert "for each of 1 process:" in text


@pytest.mark.parametrize(
    "content",
    ["[]", '{"optimizer": {"state": {"0": 1}, "param_groups": []}}', '{"history": {}}'],
)
def test_an_edited_optimizer_offers_to_reset_it_92(
    content: str, first: Trained, train_lora: TrainLora, tmp_path: Path
) -> None:
    state = shutil.copytree(first.folder / "photo-step00000001-state", tmp_path / "photo-state")
    if "history" in content:
        whole = json.loads((state / "details.json").read_text(encoding="utf-8"))
        content = json.dumps({**whole, "observers": json.loads(content)})
    (state / "details.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="--reset_optimizer"):
        train_lora(**QUICK, max_train_steps=2, resume=str(state))


def test_the_latest_state_is_that_of_the_most_steps_99(
    first: Trained, train_lora: TrainLora, tmp_path: Path
) -> None:
    """Whatever the clocks say, and whatever the names are."""
    shutil.copytree(first.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "photo-state").rename(tmp_path / "photo-step00000000-state")
    for path in tmp_path.glob("photo-step00000000-state/**"):
        os.utime(path, (0, 0))
    run = train_lora(**QUICK, max_train_steps=3, output_dir=str(tmp_path), resume="latest")
    assert [step["step"] for step in run.steps] == [3]


def test_everything_may_have_moved_to_another_machine_96(
    first: Trained,
    train_lora: TrainLora,
    same_tensors: SameTensors,
    photographs: Path,
    tiny_file: Path,
    tmp_path: Path,
) -> None:
    straight = train_lora(lr_scheduler="constant", max_train_steps=3)
    moved: dict[str, Any] = {
        "train_data_dir": str(shutil.copytree(photographs, tmp_path / "pictures")),
        "pretrained_model_name_or_path": str(shutil.copy(tiny_file, tmp_path / "base.safetensors")),
        "output_dir": str(tmp_path / "results"),
        "resume": str(shutil.copytree(first.folder / "photo-state", tmp_path / "from-elsewhere")),
    }
    run = train_lora(**QUICK, max_train_steps=3, **moved)
    assert same_tensors(run.tensors, straight.tensors)


def test_observers_get_back_what_they_kept_94(counting: Path, train_lora: TrainLora) -> None:
    options = {**QUICK, "plugin": [str(counting)], "count_steps": True}
    run = train_lora(**options, max_train_steps=2)
    state = str(run.folder / "photo-state")
    rest = train_lora(**options, max_train_steps=3, resume=state)
    assert (rest.folder / "counted.txt").read_text() == "3 [3.0, 6.0]"

    without = {**options, "count_steps": False, "max_train_steps": 3, "resume": state}
    with pytest.raises(UserError, match=r"observer counting:counter kept .*\n.*drop_plugin_state"):
        train_lora(**without)
    again = train_lora(**without, drop_plugin_state=True)
    assert again.result.steps == 3
