"""States: N and M steps are bitwise N+M, what does not fit is refused, half of one is none."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sdxl_train import UserError
from sdxl_train.state import complete_states, read_manifest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import (
        MakeOptions,
        SameTensors,
        StartCommand,
        StartProcess,
        Trained,
        TrainLora,
    )

RANDOM = {
    "shuffle_caption": True,
    "caption_dropout_rate": 0.3,
    "flip_aug": True,
    "network_dropout": 0.1,
    "noise_offset": 0.05,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 8,
}
"""Everything that draws or counts, in a run of eight steps over epochs of three."""


@pytest.fixture(scope="module")
def straight(train_lora: TrainLora) -> Trained:
    return train_lora(**RANDOM)


@pytest.fixture(scope="module")
def saving(train_lora: TrainLora) -> Trained:
    """The same run, saving as it goes: what is left of it when it ends is all its states."""
    return train_lora(**RANDOM, save_state=True, save_every_n_steps=2)


def _stopped_at(step: int, saving: Trained, folder: Path) -> dict[str, str]:
    """Lay out what the saving run had written when it was stopped after ``step``."""
    for state in (path for number, path in complete_states(saving.folder) if number <= step):
        shutil.copytree(state, folder / state.name)
    return {"output_dir": str(folder), "resume": "latest"}


def test_saving_states_changes_nothing(
    straight: Trained, saving: Trained, same_tensors: SameTensors
) -> None:
    assert same_tensors(straight.tensors, saving.tensors)


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resumed_run_equals_the_straight_one(
    step: int,
    straight: Trained,
    saving: Trained,
    train_lora: TrainLora,
    same_tensors: SameTensors,
    tmp_path: Path,
) -> None:
    resumed = train_lora(**RANDOM, **_stopped_at(step, saving, tmp_path))
    assert same_tensors(resumed.tensors, straight.tensors)
    assert resumed.steps == straight.steps[step:]


def test_run_resumed_twice_equals_the_straight_one(
    straight: Trained,
    saving: Trained,
    train_lora: TrainLora,
    same_tensors: SameTensors,
    tmp_path: Path,
) -> None:
    once = _stopped_at(2, saving, tmp_path / "once")
    train_lora(**RANDOM, **once, save_state=True, save_every_n_steps=3)
    shutil.rmtree(tmp_path / "once" / "photo-state")
    twice = train_lora(**RANDOM, **once, max_data_loader_n_workers=2)
    assert [step["step"] for step in twice.steps] == [7, 8]
    assert same_tensors(twice.tensors, straight.tensors)


def test_total_may_grow_on_the_way(train_lora: TrainLora, same_tensors: SameTensors) -> None:
    whole = train_lora(lr_scheduler="constant", max_train_steps=5)
    first = train_lora(lr_scheduler="constant", max_train_steps=2, save_state_on_train_end=True)
    state = str(first.folder / "photo-state")
    rest = train_lora(lr_scheduler="constant", max_train_steps=5, resume=state)
    assert [step["step"] for step in rest.steps] == [3, 4, 5]
    assert same_tensors(rest.tensors, whole.tensors)


def test_schedule_of_a_longer_run_is_that_of_its_whole_length(train_lora: TrainLora) -> None:
    """The rate of step 4 of 6 under ``linear`` is 1 - 3/6, whatever the total was before."""
    first = train_lora(lr_scheduler="linear", max_train_steps=3, save_state_on_train_end=True)
    state = str(first.folder / "photo-state")
    rest = train_lora(lr_scheduler="linear", max_train_steps=6, resume=state)
    rates = [step["learning_rates"]["unet"] for step in rest.steps]
    assert rates == pytest.approx([1e-3 * (1 - done / 6) for done in (3, 4, 5)])


def test_complete_run_says_so_and_writes_nothing(
    saving: Trained, start_process: StartProcess
) -> None:
    before = {path: path.stat().st_mtime_ns for path in saving.folder.rglob("*")}
    again = {**saving.options, "resume": "latest"}
    done = start_process(again)
    assert done.wait() == 0, done.text
    assert "already complete: 8 of 8 steps" in done.text
    assert {path: path.stat().st_mtime_ns for path in saving.folder.rglob("*")} == before


def test_latest_without_a_state_starts_from_the_beginning(train_lora: TrainLora) -> None:
    run = train_lora(resume="latest", max_train_steps=1)
    assert [step["step"] for step in run.steps] == [1]


def test_what_shapes_the_training_must_not_change(
    saving: Trained, train_lora: TrainLora, photographs: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(photographs, tmp_path / "changed")
    (changed / "2_photo" / "coffee.txt").write_text("tea", encoding="utf-8")
    options = {**RANDOM, "network_dim": 8, "seed": 1, "train_data_dir": str(changed)}
    with pytest.raises(UserError) as raised:
        train_lora(**options, resume=str(saving.folder / "photo-step00000004-state"))
    text = str(raised.value)
    assert "network_dim: is 8 now, 4 in" in text
    assert "seed: is 1 now, 42 in" in text
    assert "the images, captions or buckets are not those of" in text


def test_other_base_model_is_refused(
    saving: Trained, train_lora: TrainLora, tiny_folder: Path
) -> None:
    state = str(saving.folder / "photo-step00000004-state")
    with pytest.raises(UserError, match="resume with the base model of the state"):
        train_lora(**RANDOM, pretrained_model_name_or_path=str(tiny_folder), resume=state)


def test_folder_that_is_no_state_is_refused_with_those_nearby(
    saving: Trained, train_lora: TrainLora
) -> None:
    with pytest.raises(UserError, match=r"no complete state.*\n.*photo-step00000006-state"):
        train_lora(**RANDOM, resume=str(saving.folder))


def test_half_written_and_corrupt_states_do_not_count(
    saving: Trained, train_lora: TrainLora, tmp_path: Path
) -> None:
    _stopped_at(4, saving, tmp_path)
    half = tmp_path / ".photo-step00000006-state.ab12cd"
    shutil.copytree(saving.folder / "photo-step00000006-state", half)
    (half / "state.json").unlink()
    assert [step for step, _ in complete_states(tmp_path, "photo")] == [2, 4]

    corrupt = tmp_path / "photo-step00000004-state" / "optimizer.safetensors"
    corrupt.write_bytes(corrupt.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"optimizer\.safetensors: is corrupt"):
        train_lora(**RANDOM, output_dir=str(tmp_path), resume="latest")


def test_whole_state_under_its_temporary_name_counts(saving: Trained, tmp_path: Path) -> None:
    """A kill between two renames leaves the state under the name it was written to."""
    _stopped_at(2, saving, tmp_path)
    shutil.copytree(
        saving.folder / "photo-step00000004-state", tmp_path / ".photo-step00000004-state.ab12cd"
    )
    assert [step for step, _ in complete_states(tmp_path, "photo")] == [2, 4]
    assert complete_states(tmp_path, "other") == []


def test_state_holds_no_pickle_and_no_path(saving: Trained) -> None:
    state = saving.folder / "photo-state"
    assert sorted(path.name for path in state.iterdir()) == [
        "details.json",
        "optimizer.safetensors",
        "parameters.safetensors",
        "state.json",
    ]
    assert read_manifest(state).step == 8
    assert str(saving.folder) not in (state / "state.json").read_text(encoding="utf-8")


def test_later_schema_is_refused(saving: Trained, tmp_path: Path) -> None:
    state = shutil.copytree(saving.folder / "photo-state", tmp_path / "photo-state")
    document = json.loads((state / "state.json").read_text(encoding="utf-8"))
    (state / "state.json").write_text(json.dumps({**document, "schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        read_manifest(state)


def test_old_states_go_as_the_options_say(train_lora: TrainLora) -> None:
    run = train_lora(
        max_train_steps=5,
        save_state=True,
        save_every_n_steps=1,
        save_last_n_steps=3,
        save_last_n_steps_state=1,
    )
    networks = sorted(path.name for path in run.folder.glob("photo-step*.safetensors"))
    states = sorted(path.name for path in run.folder.glob("photo*-state"))
    assert networks == [f"photo-step0000000{step}.safetensors" for step in (3, 4, 5)]
    assert states == ["photo-state", "photo-step00000005-state"]


def test_stopped_run_goes_on_to_the_straight_result(
    options: MakeOptions,
    start_command: StartCommand,
    train_lora: TrainLora,
    same_tensors: SameTensors,
) -> None:
    chosen = options(max_train_steps=60, progress=True, plugin=None, save_state=True)
    process = start_command(chosen)
    assert process.stderr is not None
    next(line for line in process.stderr if line.startswith("step 6/60"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert process.returncode == 143

    ((stopped, _),) = complete_states(Path(chosen["output_dir"]))
    assert 6 <= stopped < 60
    total = stopped + 2
    again = train_lora(
        max_train_steps=total, output_dir=chosen["output_dir"], resume="latest", plugin=None
    )
    straight = train_lora(max_train_steps=total, plugin=None)
    assert same_tensors(again.tensors, straight.tensors)


def test_base_model_may_have_moved(
    saving: Trained,
    straight: Trained,
    train_lora: TrainLora,
    same_tensors: SameTensors,
    tiny_file: Path,
    tmp_path: Path,
) -> None:
    moved = shutil.copy(tiny_file, tmp_path / "elsewhere.safetensors")
    state = str(saving.folder / "photo-step00000006-state")
    resumed = train_lora(**RANDOM, pretrained_model_name_or_path=str(moved), resume=state)
    assert same_tensors(resumed.tensors, straight.tensors)
