"""Signals to a real process at known places: each ends as the documents say, and loses nothing.

A run is held inside the function that a test names, the signal is sent, and the run goes on when it
has arrived. No clock is involved.
"""

from __future__ import annotations

import json
import shutil
import signal
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from safetensors.torch import load_file

from sdxl_train.files import TEMPORARY
from sdxl_train.state import complete_states

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import MakeOptions, Place, StartProcess

PREFLIGHT = ("sdxl_train.preflight:BatchPlan", 1)
CACHING = ("sdxl_train.ldm.loaded:LoadedLdm.encode_images", 2)
TRAINING = ("sdxl_train.loop:batch_loss", 2)
SAVING = ("sdxl_train.tensor_file:_bytes", 3)
SAMPLING = ("sdxl_lora_plugins.observers.sampling:Sampling._draw", 1)
CLOSING = ("sdxl_train.run:Trainer.close", 1)


class Outcome:
    """How a process ended that got a signal."""

    def __init__(self, code: int, log: str, folder: Path) -> None:
        self.code = code
        self.log = log
        self.folder = folder

    @property
    def states(self) -> list[int]:
        """The steps of the complete states."""
        return [step for step, _ in complete_states(self.folder, "photo")]

    @property
    def networks(self) -> list[str]:
        """The names of the networks, each of which can be read."""
        paths = sorted(self.folder.glob("*.safetensors"))
        assert all(load_file(path) for path in paths)
        return [path.stem for path in paths]

    @property
    def status(self) -> str:
        """What the record says of the end."""
        record = json.loads((self.folder / "photo.run.json").read_text(encoding="utf-8"))
        return str(record["results"]["status"])


class Signalled(Protocol):
    def __call__(self, place: Place, number: signal.Signals, **changes: Any) -> Outcome: ...


@pytest.fixture
def signalled(start_process: StartProcess, options: MakeOptions) -> Signalled:
    """Run with these options, and send a signal at a place."""

    def run(place: Place, number: signal.Signals, **changes: Any) -> Outcome:
        chosen = options(**{"plugin": None, "max_train_steps": 3, "progress": True, **changes})
        process = start_process(chosen, hold=place)
        process.wait_until_held()
        process.send(number)
        code = process.wait()
        assert "Traceback" not in process.text, process.text
        left = [path.name for path in process.folder.rglob(f"{TEMPORARY}*")]
        assert left == [], "a part of a file was left"
        assert not (process.folder / ".photo.lock").exists()
        return Outcome(code, process.text, process.folder)

    return run


ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "code"), ENDS)
def test_checks_end_at_once_and_write_nothing(
    number: signal.Signals, code: int, signalled: Signalled
) -> None:
    ended = signalled(PREFLIGHT, number)
    assert ended.code == code
    assert list(ended.folder.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), ENDS)
def test_caching_ends_at_once_and_leaves_whole_entries(
    number: signal.Signals, code: int, signalled: Signalled, photographs: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(photographs, tmp_path / "data")
    before = {path.name for path in data.rglob("*")}
    ended = signalled(
        CACHING,
        number,
        train_data_dir=str(data),
        cache_latents=True,
        cache_latents_to_disk=True,
        vae_batch_size=1,
    )
    assert ended.code == code
    assert ended.networks == []
    new = [path for path in data.rglob("*") if path.is_file() and path.name not in before]
    assert all(load_file(path) for path in new if path.suffix == ".safetensors")
    assert not any(path.name.startswith(TEMPORARY) for path in new)


@pytest.mark.parametrize("place", [PREFLIGHT, CACHING], ids=["checks", "caching"])
def test_a_request_to_save_is_declined_before_there_is_anything(
    place: Place, signalled: Signalled
) -> None:
    """By default it would end the process."""
    ended = signalled(place, signal.SIGUSR1, cache_latents=True, vae_batch_size=1)
    assert ended.code == 0
    assert "SIGUSR1: nothing to save yet" in ended.log
    assert ended.networks == ["photo"]
    assert ended.states == []


@pytest.mark.parametrize("place", [TRAINING, SAVING], ids=["training", "saving"])
@pytest.mark.parametrize(("number", "code"), ENDS)
def test_the_step_is_finished_and_saved(
    place: Place, number: signal.Signals, code: int, signalled: Signalled
) -> None:
    """What is being written becomes whole; the state is that of the step that runs then."""
    ended = signalled(place, number, save_every_n_steps=1)
    assert ended.code == code
    assert ended.networks == ["photo-step00000001", "photo-step00000002"]
    assert ended.states == [2]
    assert ended.status == "interrupted"


@pytest.mark.parametrize("place", [TRAINING, SAVING], ids=["training", "saving"])
def test_a_request_to_save_is_met_and_the_run_goes_on(place: Place, signalled: Signalled) -> None:
    ended = signalled(place, signal.SIGUSR1, save_every_n_steps=1)
    assert ended.code == 0
    assert ended.states == [2]
    assert ended.networks == [*(f"photo-step0000000{step}" for step in (1, 2, 3)), "photo"]
    assert ended.status == "complete"


def test_sampling_leaves_out_the_rest_of_its_pictures(signalled: Signalled, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 1\na dog --s 1\na cow --s 1\n", encoding="utf-8")
    ended = signalled(SAMPLING, signal.SIGTERM, sample_prompts=str(prompts), sample_every_n_steps=1)
    assert ended.code == 143
    assert "sampling ends early: 2 pictures are left out" in ended.log
    assert len(list((ended.folder / "sample").iterdir())) == 1
    assert ended.states == [2]


def test_a_run_that_is_over_ends_as_it_would(signalled: Signalled) -> None:
    ended = signalled(CLOSING, signal.SIGTERM)
    assert ended.code == 0
    assert ended.status == "complete"
    assert ended.networks == ["photo"]
