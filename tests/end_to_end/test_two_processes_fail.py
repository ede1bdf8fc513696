"""What happens to two processes when something happens to one: launched as users launch them."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import pytest
import torch
from safetensors.torch import load_file
from torch._C._distributed_c10d import TCPStore

from tests.end_to_end.conftest import PATIENCE, as_flags, begin_forked

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerContext

    from torch import Tensor

    from tests.end_to_end.conftest import MakeOptions, StartCommand, TrainLora

LAUNCH = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    # It chooses a free port by itself.
    *("--main_process_port", "0", "--num_machines", "1", "--dynamo_backend", "no"),
    *("--mixed_precision", "no", "--num_cpu_threads_per_process", "1"),
)
"""accelerate starts its processes by torchrun, and leaves restarts to it."""

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


Death: TypeAlias = tuple[int, str, int]
"""A process, the function in which it is killed, and the call of it."""


class RunTwo(Protocol):
    def __call__(
        self, options: dict[str, Any], death: Death | None = None
    ) -> tuple[list[int | None], str]: ...


@pytest.fixture(scope="module")
def accidents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "accidents.py"
    path.write_text(ACCIDENTS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def straight(train_lora: TrainLora) -> dict[str, Tensor]:
    """What one process makes in six steps, undisturbed."""
    return train_lora(
        optimizer_type="SGD", learning_rate=0.1, max_train_steps=6, train_batch_size=2
    ).tensors


def _assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=1e-6)


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


def command_of_two(index: int, meeting: Path, words: list[str], death: Death | None) -> None:
    """Be process ``index`` of a launch, and write what it says to a file of its own."""
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    import torch.distributed

    from sdxl_train import cli

    vars(cli)["PATIENCE"] = 0  # no launcher waits to be told
    begin_forked()
    if death is not None and death[0] == index:
        _die_in(*death[1:])
    with meeting.with_name(f"said-{index}").open("w") as said:
        sys.stderr = said
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=index, world_size=2
        )
        code = cli.main(words)
    os._exit(code)


def _die_in(place: str, call: int, how: signal.Signals = signal.SIGKILL) -> None:
    """Have this process be killed in the nth call of a function, before it does anything."""
    module, path = place.split(":")
    *holder, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in holder:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = []

    def deadly(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), how)
        return original(*arguments, **options)

    setattr(owner, name, deadly)


@pytest.fixture
def run_two(processes: ForkServerContext, tmp_path: Path) -> RunTwo:
    """Run the command in two processes: their exit codes, and what both have said."""

    def run(options: dict[str, Any], death: Death | None = None) -> tuple[list[int | None], str]:
        meeting = Path(mkdtemp(dir=tmp_path)) / "meeting"
        pair = [
            processes.Process(target=command_of_two, args=(i, meeting, as_flags(options), death))
            for i in range(2)
        ]
        for process in pair:
            process.start()
        for process in pair:
            process.join()
        said = "".join(meeting.with_name(f"said-{index}").read_text() for index in range(2))
        return [process.exitcode for process in pair], said

    return run


def _status(options: dict[str, Any]) -> str:
    record = json.loads((Path(options["output_dir"]) / "photo.run.json").read_text())
    return str(record["results"]["status"])


def test_killed_process_and_restarted_job_reach_the_straight_result(
    job: dict[str, Any], start_command: StartCommand, straight: dict[str, Tensor]
) -> None:
    launcher = (*LAUNCH, "--max_restarts", "1", "-m", "sdxl_train")
    # Each process calls the loss once a step.
    process = start_command({**job, "accident": "SIGKILL", "at_call": 4}, launcher=launcher)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "the connection to another process is lost" in errors
    folder = Path(job["output_dir"])
    # The main process saved the last whole step, and the job went on from there.
    assert (folder / "photo-step00000003-state").is_dir()
    assert "resumed from" in errors
    _assert_close(load_file(folder / "photo.safetensors"), straight)


def test_signal_to_any_process_saves_once_and_one_process_goes_on(
    job: dict[str, Any], run_two: RunTwo, train_lora: TrainLora, straight: dict[str, Tensor]
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
    _assert_close(again.tensors, straight)


@pytest.mark.parametrize(
    ("accident", "cause", "fsdp"),
    [
        ("raise", "process 1 of 2: ZeroDivisionError: process one divides by zero", False),
        # The other one waits for weights, and not for a word.
        ("raise", "process 1 of 2: ZeroDivisionError: process one divides by zero", True),
        ("nan", "step 3: the loss is not finite", False),
    ],
    ids=["error", "error with spread weights", "nan"],
)
def test_cause_is_told_once_and_the_last_step_is_saved(
    accident: str, cause: str, fsdp: bool, job: dict[str, Any], run_two: RunTwo
) -> None:
    codes, errors = run_two({**job, "accident": accident, "at_call": 3, "fsdp": fsdp})
    assert codes == [1, 1]
    assert errors.count(cause) == 1, errors
    assert errors.count("error:") == 1
    assert "Traceback" not in errors
    assert _status(job).startswith("failed")
    folder = Path(job["output_dir"])
    assert (folder / "photo-step00000002-state").is_dir()
    assert "the state of step 2 is saved" in errors


DEATHS: tuple[Death, ...] = (
    (1, "sdxl_train.data.cache:LatentCache._encode", 2),
    (0, "sdxl_train.loop:batch_loss", 3),
    # Step 4 is to be saved, which the main process does.
    (1, "sdxl_train.run:Trainer._save", 2),
    # After the other files of the state of step 6, and before the one that makes it whole.
    (0, "sdxl_train.state:_write_json", 2),
)
"""While caching, in step 3, while another process saves step 4, while it saves step 6 itself."""


def test_killed_process_ends_all_with_the_cause_told_once_and_new_jobs_go_on(
    job: dict[str, Any], run_two: RunTwo, straight: dict[str, Tensor]
) -> None:
    saving = {**job, "save_every_n_steps": 2, "save_state": True, "cache_latents": True}
    folder = Path(job["output_dir"])
    for death in DEATHS:
        codes, errors = run_two(saving, death)
        killed, other = (codes[death[0]], codes[1 - death[0]])
        assert (killed, other) == (-signal.SIGKILL, 1), errors
        assert errors.count("the connection to another process is lost") == 1
        assert errors.count("error:") == 1
    states = sorted(path.name for path in folder.glob("photo*-state"))
    assert states == ["photo-step00000002-state", "photo-step00000004-state"]

    codes, errors = run_two(saving)
    assert codes == [0, 0], errors
    assert "resumed from" in errors
    _assert_close(load_file(folder / "photo.safetensors"), straight)


def work_in_a_fork(door: Connection) -> None:
    """Fork a worker as a data loader does, and wait with it for ever."""
    from sdxl_train.signals import leave_to_parent

    if os.fork() == 0:
        leave_to_parent(0)
        door.send("here")
    signal.pause()


def test_worker_of_a_killed_process_ends_at_once(processes: ForkServerContext) -> None:
    # Or it would hold the connections that the others wait on.
    here, there = processes.Pipe()
    process = processes.Process(target=work_in_a_fork, args=(there,))
    process.start()
    there.close()
    assert here.recv() == "here"
    process.kill()
    assert here.poll(60)
    with pytest.raises(EOFError):
        here.recv()
    process.join()


def run_until_it_hangs(index: int, port: int, words: list[str], said: Path) -> None:
    """Be process ``index`` of a launch whose minutes are seconds; number 1 stops in a step."""
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    from sdxl_train import cli, process_group

    vars(process_group)["timedelta"] = lambda minutes=0, seconds=0: timedelta(
        seconds=minutes + seconds
    )
    begin_forked()
    if index == 1:
        _die_in("sdxl_train.loop:batch_loss", 3, signal.SIGSTOP)
    with said.open("w") as file:
        sys.stderr = file
        code = cli.main(words)
    os._exit(code)


def test_process_that_hangs_is_given_up_after_ddp_timeout(
    job: dict[str, Any], processes: ForkServerContext, tmp_path: Path
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = as_flags({**job, "ddp_timeout": 15})
    pair = [
        processes.Process(
            target=run_until_it_hangs, args=(i, store.port, words, tmp_path / f"said-{i}")
        )
        for i in range(2)
    ]
    for process in pair:
        process.start()
    pair[0].join(PATIENCE)
    pair[1].kill()
    errors = (tmp_path / "said-0").read_text()
    assert pair[0].exitcode == 1, errors
    assert "another process has not answered for 0.25 minutes (--ddp_timeout)" in errors
    assert "the state of step 2 is saved" in errors
    pair[1].join()


def test_wrong_input_is_told_once(job: dict[str, Any], run_two: RunTwo) -> None:
    codes, errors = run_two({**job, "network_dim": 0, "zero_stage": 2})
    assert codes == [2, 2]
    assert errors.count("2 problems, nothing was started") == 1
    assert errors.count("--zero_stage: has no effect without --deepspeed") == 1
