"""A tiny SDXL and small real photographs, made once, and runs on them that tell what they did."""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import sdxl_train
from sdxl_lora_plugins.model import SDXL, TINY
from sdxl_train.cli import main
from sdxl_train.errors import UserError
from sdxl_train.ldm.tiny import write_tiny
from sdxl_train.preflight import prepare
from sdxl_train.settings import from_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerContext
    from multiprocessing.process import BaseProcess

    from torch import Tensor

    from sdxl_train.observed import RunResult

SEED = 7
SHALLOW = replace(TINY, depths=(1, 1, 1))
"""A fifth cheaper to train. What deeper blocks are called is held on TINY, by tests/sdxl."""

PHOTOGRAPHS = {
    "astronaut": ("astronaut.png", (64, 64), "a woman in an orange space suit, a flag"),
    "coffee": ("coffee.png", (64, 64), "a cup of coffee on a wooden table"),
    "rocket": ("rocket.jpg", (64, 64), "a rocket on its launch pad, night"),
    "chelsea": ("chelsea.png", (75, 50), "a tabby cat, green eyes, close up"),
    "hubble": ("hubble_deep_field.jpg", (75, 50), "galaxies in deep space"),
}
"""Photographs that come with scikit-image: file, (width, height) to train at, caption."""

RECORDER = '''
"""Keeps what a run starts from and what each of its steps gives, beside its files."""
import json

from safetensors.torch import save_file

from sdxl_train import hookimpl

_steps = []


@hookimpl
def run_started(run):
    _steps.clear()
    state = run.assembly.adapter.state_dict()
    save_file({name: t.clone() for name, t in state.items()}, run.output_dir / "initial.st")


@hookimpl
def step_finished(step):
    _steps.append(
        {
            "step": step.step,
            "epoch": step.epoch,
            "loss": step.loss.item(),
            "grad_norm": step.grad_norm.item(),
            "learning_rates": dict(step.learning_rates),
            "keys": list(step.keys),
        }
    )


@hookimpl
def run_finished(run):
    (run.output_dir / "steps.json").write_text(json.dumps(_steps))
'''


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run that is over: what it was asked, what it wrote, what its steps gave."""

    options: dict[str, Any]
    result: RunResult
    folder: Path

    @cached_property
    def initial(self) -> dict[str, Tensor]:
        """The network before the first step, under the names of files."""
        return load_file(self.folder / "initial.st")

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """What each step gave."""
        steps: list[dict[str, Any]] = json.loads((self.folder / "steps.json").read_text())
        return steps

    @property
    def path(self) -> Path:
        """The final file."""
        return self.result.files[-1]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the final file."""
        return load_file(self.path)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The metadata of the final file."""
        return read_metadata(self.path)


class MakeOptions(Protocol):
    def __call__(self, **changes: Any) -> dict[str, Any]: ...


class TrainLora(Protocol):
    def __call__(self, **changes: Any) -> Trained: ...


class StartCommand(Protocol):
    def __call__(
        self, options: dict[str, Any], *, launcher: tuple[str, ...] = ...
    ) -> subprocess.Popen[str]: ...


PATIENCE = 300
"""Seconds until a test gives up on a process; nothing is measured by them."""

Place: TypeAlias = tuple[str, int]
"""A function, as ``module:path``, and the call in which a process is to wait in it."""
Around: TypeAlias = Callable[[Callable[[], int]], int]
"""Called in the process with the command to run; gives the exit code."""


class CommandProcess:
    """The command in a process of its own, forked from one that has imported everything."""

    def __init__(
        self, process: BaseProcess, door: Connection, log: Path, options: dict[str, Any]
    ) -> None:
        self.process = process
        self.door = door
        self.log = log
        self.folder = Path(options["output_dir"])

    def wait_until_held(self) -> None:
        """Wait until it has come to its place; it goes on when a signal has arrived."""
        try:
            assert self.door.poll(PATIENCE), "it never came to this place"
            self.door.recv()
        except EOFError:
            pytest.fail(self.text)

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Give the exit code, as the system sees it."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, self.text
        return self.process.exitcode

    @property
    def text(self) -> str:
        """What it has written to its two outputs."""
        return self.log.read_text(encoding="utf-8")


class StartProcess(Protocol):
    def __call__(
        self, options: dict[str, Any], *, hold: Place | None = None, around: Around | None = None
    ) -> CommandProcess: ...


class Planned(Protocol):
    def __call__(self, flags: str | list[str], **changes: Any) -> tuple[int, str]: ...


class SameTensors(Protocol):
    def __call__(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> bool: ...


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Have the commands of tests hear SIGINT, though a shell's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in one thread: for tensors this small, several only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL as a diffusers folder. Not to be written to."""
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny-sdxl", SDXL, SHALLOW, seed=SEED)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tiny SDXL as a single file. Not to be written to."""
    path = tmp_path_factory.mktemp("model") / "tiny-sdxl.safetensors"
    return write_tiny(path, SDXL, SHALLOW, seed=SEED, single_file=True)


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL with more layers, for what must learn. Not to be written to."""
    return write_tiny(tmp_path_factory.mktemp("model") / "deep-sdxl", SDXL, TINY, seed=SEED)


@pytest.fixture(scope="session")
def deep_v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a model that says it predicts velocity. Not to be written to."""
    path = tmp_path_factory.mktemp("model") / "deep-sdxl-v"
    return write_tiny(path, SDXL, TINY, seed=SEED, prediction_type="v_prediction")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photographs with captions, three square and two wide, each twice an epoch."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, (source, size, caption) in PHOTOGRAPHS.items():
        path = folder / "2_photo" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        with resources.files("skimage.data").joinpath(source).open("rb") as file:
            Image.open(file).convert("RGB").resize(size).save(path)
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file plugin that writes down what a run does."""
    path = tmp_path_factory.mktemp("plugins") / "recorder.py"
    path.write_text(RECORDER, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def options(
    tiny_file: Path,
    photographs: Path,
    recorder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> MakeOptions:
    """Options of a short run on the photographs, with its own output folder."""

    def make(**changes: Any) -> dict[str, Any]:
        chosen = {
            "pretrained_model_name_or_path": str(tiny_file),
            "train_data_dir": str(photographs),
            "output_dir": str(tmp_path_factory.mktemp("output")),
            "output_name": "photo",
            "plugin": [str(recorder)],
            # Two buckets, 64x64 and 64x32; the wide photographs are cropped, not resized.
            "resolution": 64,
            "enable_bucket": True,
            "bucket_no_upscale": True,
            "bucket_reso_steps": 32,
            "train_batch_size": 2,
            "network_module": "networks.lora",
            "network_dim": 4,
            "network_alpha": 2.0,
            "learning_rate": 1e-3,
            "max_train_steps": 4,
            "seed": 42,
            "progress": False,
            "report": False,
            "max_data_loader_n_workers": 0,
            **changes,
        }
        return {name: value for name, value in chosen.items() if value is not None}

    return make


@pytest.fixture(scope="session")
def train_lora(options: MakeOptions) -> TrainLora:
    """Train in this process; a change to ``None`` leaves the option out."""

    def train(**changes: Any) -> Trained:
        chosen = options(**changes)
        result = sdxl_train.train(chosen)
        return Trained(options=chosen, result=result, folder=Path(chosen["output_dir"]))

    return train


@pytest.fixture(scope="session")
def start_command() -> StartCommand:
    """Start the installed command, or another way to run it, with these options as flags."""
    installed = (str(Path(sys.executable).with_name("sdxl-train")),)

    def start(
        options: dict[str, Any], *, launcher: tuple[str, ...] = installed
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*launcher, *as_flags(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return start


@pytest.fixture
def planned(options: MakeOptions, capsys: pytest.CaptureFixture[str]) -> Planned:
    """Plan a run with these flags in place of the usual options: the exit code, and what it says.

    A plan goes as far as a run does before it loads weights.
    """

    def plan(flags: str | list[str], **changes: Any) -> tuple[int, str]:
        words = flags.split() if isinstance(flags, str) else flags
        chosen = options(plugin=None, **changes)
        common = {name: value for name, value in chosen.items() if f"--{name}" not in words}
        capsys.readouterr()
        code = main(["plan", *as_flags(common), *words])
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return code, text

    return plan


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Processes forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            *("sdxl_train.cli", "sdxl_train.api", "sdxl_train.preflight", "sdxl_train.run"),
            *("sdxl_train.planning", "sdxl_train.ldm.loading", "sdxl_train.tensor_file"),
            *("sdxl_lora_plugins", "sdxl_lora_plugins.networks.lora", "PIL.PngImagePlugin"),
        ]
    )
    return context


def begin_forked() -> None:
    """Begin a process of :func:`processes`."""
    torch.set_num_threads(1)
    # Or the collector would look through, and so copy, all that was imported: half a second.
    gc.freeze()


@pytest.fixture
def start_process(processes: ForkServerContext, tmp_path: Path) -> Iterator[StartProcess]:
    """Start the command so that it costs no imports, and, if asked, waits in a function."""
    started: list[CommandProcess] = []

    def start(
        options: dict[str, Any], *, hold: Place | None = None, around: Around | None = None
    ) -> CommandProcess:
        log = tmp_path / f"log-{len(started)}.txt"
        here, there = processes.Pipe()
        words = (as_flags(options), log, there, hold, around)
        process = processes.Process(target=_run_command, args=words)
        process.start()
        there.close()
        started.append(CommandProcess(process, here, log, options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.join()


def _run_command(
    argv: list[str], log: Path, door: Connection, hold: Place | None, around: Around | None
) -> None:
    """Run the command as its entry point does, in a process of its own."""
    begin_forked()
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    if hold is not None:
        _hold(*hold, door)
    code = around(lambda: main(argv)) if around else main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _hold(place: str, call: int, door: Connection) -> None:
    """Have a function stop in its nth call, say so at the door, and wait for a signal."""
    arrived, told = os.pipe()
    os.set_blocking(told, False)
    module, path = place.split(":")
    *holder, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in holder:
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, name)
    calls = []

    @wraps(original)
    def held(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            # Written by the handler in C, however early the signal comes.
            signal.set_wakeup_fd(told, warn_on_full_buffer=False)
            door.send("here")
            os.read(arrived, 1)
        return original(*arguments, **options)

    setattr(owner, name, held)


def as_flags(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words += [f"--{name}", str(value).lower()]
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", str(value)]
    return words


@pytest.fixture(scope="session")
def same_tensors() -> SameTensors:
    """Tell whether two sets of tensors are the same, bit for bit."""

    def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
        return first.keys() == second.keys() and all(
            torch.equal(tensor, second[name]) and tensor.dtype == second[name].dtype
            for name, tensor in first.items()
        )

    return same


class CheckRun(Protocol):
    def __call__(self, **changes: Any) -> tuple[list[str], list[str]]: ...


@pytest.fixture(scope="session")
def check_run(options: MakeOptions) -> CheckRun:
    """Check a run as before its start; give its problems, or without any its warnings."""

    def check(**changes: Any) -> tuple[list[str], list[str]]:
        try:
            prepared = prepare(from_mapping(options(**changes)))
        except UserError as error:
            return [str(problem) for problem in error.problems], []
        return [], prepared.warnings

    return check
