"""What happens to two processes when something happens to one: launched as users launch them."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import as_flags

if TYPE_CHECKING:
    from tests.end_to_end.conftest import MakeOptions, StartCommand, TrainLora

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
"""It chooses a free port by itself."""

ACCIDENTS = '''
"""Accidents that happen to process 1, once, where a file tells that they have not yet happened."""
import os
import pathlib
import signal

from sdxl_train import Field, Loss, hookimpl


class Accident(Loss):
    """Squared error, in whose nth call something happens."""

    may_change = frozenset({"accident", "at_call"})
    accident: str = Field("", description="What happens.")
    at_call: int = Field(0, description="When.")
    once: str = Field("", description="File that is removed when it happens.")

    def build(self, schedule):
        calls = []

        def loss(prediction, target, timesteps):
            calls.append(1)
            here = os.environ.get("RANK") == "1" and len(calls) == self.at_call
            if here and pathlib.Path(self.once).exists():
                pathlib.Path(self.once).unlink()
                if self.accident == "raise":
                    raise ZeroDivisionError("process one divides by zero")
                if self.accident == "nan":
                    return (prediction - target) / 0 * float("nan")
                os.kill(os.getpid(), getattr(signal, self.accident))
            return (prediction - target) ** 2

        return loss


@hookimpl
def register_losses():
    return {"accident": Accident}
'''


class RunTwo(Protocol):
    def __call__(self, options: dict[str, Any]) -> tuple[list[int | None], str]: ...


@pytest.fixture(scope="module")
def accidents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "accidents.py"
    path.write_text(ACCIDENTS, encoding="utf-8")
    return path


@pytest.fixture
def job(options: MakeOptions, accidents: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a run of six steps, with no accident yet."""
    once = tmp_path / "once"
    once.touch()
    return options(
        plugin=[str(accidents)],
        loss_type="accident",
        once=str(once),
        optimizer_type="SGD",
        learning_rate=0.1,
        max_train_steps=6,
        train_batch_size=1,
        resume="latest",
    )


def command_of_two(index: int, meeting: Path, words: list[str]) -> None:
    """Be process ``index`` of a launch, and write what it says to a file of its own."""
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    import torch.distributed

    from sdxl_train import cli

    vars(cli)["PATIENCE"] = 0  # no launcher waits to be told
    torch.set_num_threads(1)
    with meeting.with_name(f"said-{index}").open("w") as said:
        sys.stderr = said
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=index, world_size=2
        )
        code = cli.main(words)
    os._exit(code)


@pytest.fixture
def run_two(tmp_path: Path) -> RunTwo:
    """Run the command in two processes: their exit codes, and what both have said."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["sdxl_train.run", "sdxl_train.planning", "sdxl_train.ldm.loading"]
    )

    def run(options: dict[str, Any]) -> tuple[list[int | None], str]:
        processes = [
            context.Process(
                target=command_of_two, args=(index, tmp_path / "meeting", as_flags(options))
            )
            for index in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        said = "".join((tmp_path / f"said-{index}").read_text() for index in range(2))
        return [process.exitcode for process in processes], said

    return run


def _status(options: dict[str, Any]) -> str:
    record = json.loads((Path(options["output_dir"]) / "photo.run.json").read_text())
    return str(record["results"]["status"])


def test_killed_process_and_restarted_job_reach_the_straight_result(
    job: dict[str, Any], start_command: StartCommand, train_lora: TrainLora
) -> None:
    launcher = (*TORCHRUN, "--max_restarts", "1", "-m", "sdxl_train")
    # Each process calls the loss once a step.
    process = start_command({**job, "accident": "SIGKILL", "at_call": 4}, launcher=launcher)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "the connection to another process is lost" in errors
    folder = Path(job["output_dir"])
    # The main process saved the last whole step, and the job went on from there.
    assert (folder / "photo-step00000003-state").is_dir()
    assert "resumed from" in errors
    straight = train_lora(
        optimizer_type="SGD", learning_rate=0.1, max_train_steps=6, train_batch_size=2
    )
    for name, tensor in load_file(folder / "photo.safetensors").items():
        torch.testing.assert_close(tensor, straight.tensors[name], rtol=0, atol=1e-6)


def test_signal_to_any_process_saves_once_and_one_process_goes_on(
    job: dict[str, Any], run_two: RunTwo, train_lora: TrainLora
) -> None:
    codes, errors = run_two({**job, "accident": "SIGTERM", "at_call": 2})
    assert codes == [143, 143], errors
    assert _status(job) == "interrupted"
    folder = Path(job["output_dir"])
    (state,) = folder.glob("*-state")
    manifest = json.loads((state / "state.json").read_text())
    assert (manifest["processes"], manifest["batch_sizes"]) == (2, [1])
    # The second step was told to all before it was done.
    assert manifest["step"] == 2

    # One process with the whole batch goes on where two were stopped.
    quiet = {"loss_type": "accident", "plugin": job["plugin"], "once": job["once"]}
    descent = {"optimizer_type": "SGD", "learning_rate": 0.1, "max_train_steps": 6}
    again = train_lora(
        **{**descent, **quiet, "train_batch_size": 2, "resume": str(state)},
    )
    straight = train_lora(**{**descent, "train_batch_size": 2})
    for name, tensor in again.tensors.items():
        torch.testing.assert_close(tensor, straight.tensors[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("accident", "cause"),
    [
        ("raise", "process 1 of 2: ZeroDivisionError: process one divides by zero"),
        ("nan", "step 3: the loss is not finite"),
    ],
)
def test_cause_is_told_once_and_the_last_step_is_saved(
    accident: str, cause: str, job: dict[str, Any], run_two: RunTwo
) -> None:
    codes, errors = run_two({**job, "accident": accident, "at_call": 3})
    assert codes == [1, 1]
    assert errors.count(cause) == 1, errors
    assert errors.count("error:") == 1
    assert "Traceback" not in errors
    assert _status(job).startswith("failed")
    folder = Path(job["output_dir"])
    assert (folder / "photo-step00000002-state").is_dir()
    assert "the state of step 2 is saved" in errors


def test_wrong_input_is_told_once(job: dict[str, Any], run_two: RunTwo) -> None:
    codes, errors = run_two({**job, "network_dim": 0, "zero_stage": 2})
    assert codes == [2, 2]
    assert errors.count("2 problems, nothing was started") == 1
    assert errors.count("DeepSpeed is not supported") == 1
