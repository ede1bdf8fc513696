"""A run that fails loses nothing, and says why; one that is disturbed goes on as if it were not."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from sdxl_train import TrainingError, UserError
from sdxl_train.state import complete_states

if TYPE_CHECKING:
    from tests.end_to_end.conftest import (
        MakeOptions,
        SameTensors,
        StartProcess,
        Trained,
        TrainLora,
    )

FAILING = '''
"""Components that fail in a given step, or do nothing."""
import torch
from sdxl_train import Field, Loss, Noise, Optimizer, hookimpl


class Failing(Noise):
    """Noise that fails, or spoils the latents' images, from its nth call on."""

    may_change = frozenset({"fail_at", "spoil"})
    fail_at: int = Field(0, description="Call to fail in.")
    spoil: bool = Field(False, description="Give noise that is not finite instead.")

    def active(self):
        return self.fail_at > 0

    def build(self, schedule):
        calls = []

        def transform(noise, latents, timesteps, generator):
            calls.append(1)
            if len(calls) < self.fail_at:
                return noise
            if self.spoil:
                return noise / 0
            raise ZeroDivisionError("the noise plugin divides by zero")

        return transform


class Halfway(torch.optim.SGD):
    """Changes a weight and then fails, in its second step."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps == 2:
            self.param_groups[0]["params"][0].data += 1
            raise RuntimeError("the device fell off the bus")
        return super().step(closure)


class HalfwayOptimizer(Optimizer):
    """Fails between one weight and the next."""

    def build(self, groups):
        return Halfway(groups)


class Idle(torch.optim.SGD):
    """Steps without effect."""

    def step(self, closure=None):
        return None


class IdleOptimizer(Optimizer):
    """Does nothing."""

    def build(self, groups):
        return Idle(groups)


@hookimpl
def register_noises():
    return {"failing": Failing}


@hookimpl
def register_optimizers():
    return {"halfway": HalfwayOptimizer, "idle": IdleOptimizer}
'''

DISTURBING = '''
"""An observer that does what it must not."""
import random
import time

import numpy
import torch
from sdxl_train import Observer, hookimpl


class Disturbing(Observer):
    """Disturbs the run in the way it is told to."""

    disturb: str = ""

    def active(self):
        return bool(self.disturb)

    def build(self, run):
        way = self.disturb

        class Listener:
            def step_finished(self, run, step):
                if way == "raise":
                    raise ConnectionError("no route to the tracker")
                if way == "exit":
                    raise SystemExit(3)
                if way == "hang":
                    while True:
                        try:
                            time.sleep(60)
                        except Exception:
                            pass
                if way == "random":
                    torch.manual_seed(step.step)
                    random.seed(1)
                    numpy.random.seed(1)
                if way == "process":
                    torch.set_grad_enabled(False)
                    torch.set_default_dtype(torch.float64)
                    torch.set_num_threads(torch.get_num_threads() + 1)

        return Listener()


@hookimpl
def register_observers():
    return {"disturbing": Disturbing}
'''


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "failing.py"
    path.write_text(FAILING, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def disturbing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "disturbing.py"
    path.write_text(DISTURBING, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def straight(train_lora: TrainLora) -> Trained:
    return train_lora(max_train_steps=4)


@pytest.fixture(params=["at once", "late"])
def checked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """When a step is known to be finite: before it is taken, or as on a GPU."""
    if request.param == "late":
        monkeypatch.setattr("sdxl_train.update.Update.why_at_once", lambda update: None)
    return str(request.param)


@pytest.mark.usefixtures("checked")
def test_component_that_raises_is_blamed_and_the_last_whole_step_is_saved(
    failing: Path,
    straight: Trained,
    options: MakeOptions,
    train_lora: TrainLora,
    same_tensors: SameTensors,
    recorder: Path,
) -> None:
    chosen = options(plugin=[str(recorder), str(failing)], fail_at=3)
    with pytest.raises(ZeroDivisionError) as raised:
        train_lora(**chosen)
    notes = " ".join(raised.value.__notes__)
    assert "raised in plugin 'failing'" in notes
    assert "the state of step 2 is saved" in notes
    folder = Path(chosen["output_dir"])
    assert [step for step, _ in complete_states(folder, "photo")] == [2]
    record = json.loads((folder / "photo.run.json").read_text(encoding="utf-8"))["results"]
    assert record["status"].startswith("failed: ZeroDivisionError")

    again = train_lora(**{**chosen, "fail_at": 100, "resume": "latest"})
    assert same_tensors(again.tensors, straight.tensors)


def test_failure_in_the_first_step_saves_nothing(failing: Path, options: MakeOptions) -> None:
    chosen = options(plugin=[str(failing)], fail_at=1)
    with pytest.raises(ZeroDivisionError):
        _train(chosen)
    assert [path.name for path in _files(chosen)] == ["photo.run.json"]


def test_half_an_update_is_not_saved(failing: Path, options: MakeOptions) -> None:
    """Weights, optimizer and schedule do not belong together then."""
    chosen = options(plugin=[str(failing)], optimizer_type="halfway")
    with pytest.raises(RuntimeError, match="fell off the bus"):
        _train(chosen)
    assert [path.name for path in _files(chosen)] == ["photo.run.json"]


@pytest.mark.usefixtures("checked")
def test_values_that_are_not_finite_name_step_images_and_cause(
    failing: Path,
    straight: Trained,
    options: MakeOptions,
    train_lora: TrainLora,
    same_tensors: SameTensors,
    recorder: Path,
) -> None:
    plugins = [str(recorder), str(failing)]
    chosen = options(plugin=plugins, fail_at=2, spoil=True, save_every_n_steps=1)
    with pytest.raises(TrainingError, match=r"step 2: the loss is not finite .*Images: \w+") as e:
        train_lora(**chosen)
    assert "learning rate" in str(e.value)
    assert "the state of step 1 is saved" in " ".join(e.value.__notes__)
    (saved,) = Path(chosen["output_dir"]).glob("*.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(saved).values())

    again = train_lora(**{**chosen, "fail_at": 100, "resume": "latest"})
    assert same_tensors(again.tensors, straight.tensors)


def test_training_that_changes_nothing_is_stopped(failing: Path, options: MakeOptions) -> None:
    chosen = options(plugin=[str(failing)], optimizer_type="idle", max_train_steps=100)
    with pytest.raises(TrainingError, match=r"nothing trains: 10 steps .* have changed no weight"):
        _train(chosen)
    chosen = options(plugin=[str(failing)], optimizer_type="idle", max_train_steps=2)
    with pytest.raises(TrainingError, match="nothing trains: 2 steps"):
        _train(chosen)


@pytest.mark.parametrize(
    ("way", "failure"),
    [
        ("raise", "ConnectionError: no route to the tracker"),
        ("exit", "SystemExit: 3"),
        ("hang", "it took more than --observer_timeout 5 seconds"),
        ("random", None),
        ("process", None),
    ],
)
def test_observer_changes_neither_the_weights_nor_the_end(
    way: str,
    failure: str | None,
    disturbing: Path,
    straight: Trained,
    train_lora: TrainLora,
    same_tensors: SameTensors,
    recorder: Path,
) -> None:
    run = train_lora(plugin=[str(recorder), str(disturbing)], disturb=way, observer_timeout=5)
    assert same_tensors(run.tensors, straight.tensors)
    record = json.loads((run.folder / "photo.run.json").read_text(encoding="utf-8"))["results"]
    expected = {"observer disturbing:disturbing": f"step_finished: {failure}"} if failure else {}
    assert record["observer_failures"] == expected
    assert record["status"] == "complete"


def test_strict_observers_end_the_run(disturbing: Path, options: MakeOptions) -> None:
    with pytest.raises(ConnectionError):
        _train(options(plugin=[str(disturbing)], disturb="raise", strict_observers=True))


def test_sigusr1_saves_and_goes_on(options: MakeOptions, start_process: StartProcess) -> None:
    chosen = options(max_train_steps=8, plugin=None)
    process = start_process(chosen, hold=("sdxl_train.history:History.add", 4))
    process.wait_until_held()
    process.send(signal.SIGUSR1)
    assert process.wait() == 0, process.text
    ((step, _),) = complete_states(Path(chosen["output_dir"]), "photo")
    assert step == 4
    names = {path.name for path in Path(chosen["output_dir"]).glob("*.safetensors")}
    assert names == {f"photo-step{step:08d}.safetensors", "photo.safetensors"}


def test_earlier_run_of_the_same_name_is_kept(train_lora: TrainLora, options: MakeOptions) -> None:
    first = train_lora(max_train_steps=1, save_state=True)
    kept = {path.name for path in first.folder.glob("photo*")}
    second = train_lora(max_train_steps=2, output_dir=str(first.folder))
    (aside,) = first.folder.glob("photo-until-*")
    assert {path.name for path in aside.iterdir()} == kept
    assert second.path.is_file()
    assert complete_states(first.folder, "photo") == []

    train_lora(max_train_steps=1, output_dir=str(first.folder), overwrite=True)
    assert len(list(first.folder.glob("photo-until-*"))) == 1


def test_states_may_have_a_rhythm_of_their_own(train_lora: TrainLora) -> None:
    run = train_lora(save_every_n_steps=2, save_state_every_n_steps=3, max_train_steps=6)
    assert sorted(path.name for path in run.folder.glob("*.safetensors")) == [
        "photo-step00000002.safetensors",
        "photo-step00000004.safetensors",
        "photo-step00000006.safetensors",
        "photo.safetensors",
    ]
    assert [step for step, _ in complete_states(run.folder, "photo")] == [3, 6]


def test_initial_step_skips_what_came_before(train_lora: TrainLora, straight: Trained) -> None:
    """The draws of a step depend on its number: the images are those of steps 3 and 4."""
    run = train_lora(initial_step=2)
    assert [step["step"] for step in run.steps] == [3, 4]
    keys = [step["keys"] for step in run.steps]
    assert keys == [step["keys"] for step in straight.steps[2:]]
    later = train_lora(initial_epoch=2, max_train_epochs=2)
    assert {step["epoch"] for step in later.steps} == {2}
    with pytest.raises(UserError, match="begins behind step 4 of a run of 4 steps"):
        train_lora(initial_step=4)


def test_weights_without_their_optimizer_may_be_taken(train_lora: TrainLora) -> None:
    first = train_lora(save_state=True, max_train_steps=2)
    state = first.folder / "photo-state"
    (state / "optimizer.safetensors").write_bytes(b"corrupt")
    with pytest.raises(UserError, match=r"optimizer\.safetensors: is corrupt"):
        train_lora(resume=str(state))
    again = train_lora(resume=str(state), reset_optimizer=True)
    assert [step["step"] for step in again.steps] == [3, 4]


def _train(options: dict[str, Any]) -> None:
    import sdxl_train

    sdxl_train.train(options)


def _files(options: dict[str, Any]) -> list[Path]:
    return sorted(Path(options["output_dir"]).iterdir())
