"""A disk that is full, or fills up, and two runs that would write the same files."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from sdxl_train import TrainingError, disk
from sdxl_train.cli import main
from sdxl_train.disk import require_room, room_problem, room_remark
from sdxl_train.files import TEMPORARY
from sdxl_train.state import complete_states

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.end_to_end.conftest import (
        MakeOptions,
        SameTensors,
        StartProcess,
        Trained,
        TrainLora,
    )

ROOM = 1_000_000
"""Bytes left: the network of 0.7 MB goes in, the optimizer's state of 1.2 MB does not."""
LARGER: dict[str, Any] = {"network_dim": 5, "plugin": None}
NO_MOUNTS = 77
"""Exit code of a process that may not mount."""
_NEW_USERS, _NEW_MOUNTS = 0x10000000, 0x00020000


@pytest.fixture(scope="module")
def straight(train_lora: TrainLora) -> Trained:
    return train_lora(max_train_steps=2, **LARGER)


@pytest.fixture(scope="module")
def previous(train_lora: TrainLora) -> Trained:
    """What an earlier run of one step has left. Not to be written to."""
    return train_lora(max_train_steps=1, save_state=True, save_every_n_steps=1, **LARGER)


def _on_small_disk(
    folder: Path, previous: Path, kept: Path, *, trusted: bool, run: Callable[[], int]
) -> int:
    """Run in a process that sees a file system of its own, nearly full, in place of ``folder``."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USERS | _NEW_MOUNTS):
        return NO_MOUNTS
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    used = sum(path.stat().st_size for path in previous.rglob("*")) + 4096 * 20
    size = f"size={used + ROOM}".encode()
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, size):
        return NO_MOUNTS
    shutil.copytree(previous, folder, dirs_exist_ok=True)
    if not trusted:
        # Quotas and other writers: what is free now need not be when it is written to.
        disk.free_bytes = lambda folder: 10**12
    code = run()
    shutil.copytree(folder, kept, dirs_exist_ok=True)
    return code


def _with_small_files(folder: Path, previous: Path, run: Callable[[], int]) -> int:
    """Run in a process that may write no large file: the kernel refuses as it does when full."""
    shutil.copytree(previous, folder, dirs_exist_ok=True)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
    return run()


def _assert_whole(folder: Path) -> None:
    assert [step for step, _ in complete_states(folder, "photo")] == [1, 1]
    for path in folder.rglob("*.safetensors"):
        assert load_file(path), path
    assert not list(folder.rglob(f"{TEMPORARY}*"))
    assert not [path for path in folder.iterdir() if path.name.startswith(".photo")]


RESUMED: dict[str, Any] = {
    **LARGER,
    "max_train_steps": 2,
    "save_state": True,
    "save_every_n_steps": 1,
    "resume": "latest",
}


def test_a_disk_that_fills_up_ends_the_run_and_spoils_nothing(
    previous: Trained,
    straight: Trained,
    options: MakeOptions,
    start_process: StartProcess,
    train_lora: TrainLora,
    same_tensors: SameTensors,
    tmp_path: Path,
) -> None:
    chosen = options(**RESUMED)
    folder = Path(chosen["output_dir"])
    small = partial(_on_small_disk, folder, previous.folder, tmp_path / "kept", trusted=False)
    process = start_process(chosen, around=_Around(small))
    code = process.wait()
    if code == NO_MOUNTS:
        pytest.skip("this machine lets nobody mount; the limit of file sizes is tested anyway")
    assert code == 1, process.text
    assert "photo-step00000002-state cannot be written: No space left on device" in process.text
    assert "Traceback" not in process.text
    kept = tmp_path / "kept"
    assert (kept / "photo-step00000002.safetensors").is_file()
    _assert_whole(kept)
    again = train_lora(**RESUMED, output_dir=str(kept))
    assert same_tensors(again.tensors, straight.tensors)


def test_a_disk_without_room_is_told_before_the_run(
    previous: Trained, options: MakeOptions, start_process: StartProcess, tmp_path: Path
) -> None:
    chosen = options(**RESUMED)
    folder = Path(chosen["output_dir"])
    small = partial(_on_small_disk, folder, previous.folder, tmp_path / "kept", trusted=True)
    process = start_process(chosen, around=_Around(small))
    code = process.wait()
    if code == NO_MOUNTS:
        pytest.skip("this machine lets nobody mount; the check is tested with a stated size anyway")
    assert code == 2, process.text
    told = rf"--output_dir: one save needs 2\.\d MB, and {re.escape(str(folder))} has 1\.\d MB free"
    assert re.search(told, process.text), process.text
    _assert_whole(tmp_path / "kept")


def test_a_file_that_the_system_refuses_ends_the_run_and_spoils_nothing(
    previous: Trained, options: MakeOptions, start_process: StartProcess
) -> None:
    chosen = options(**RESUMED)
    folder = Path(chosen["output_dir"])
    limited = partial(_with_small_files, folder, previous.folder)
    process = start_process(chosen, around=_Around(limited))
    assert process.wait() == 1, process.text
    assert "photo-step00000002-state cannot be written: File too large" in process.text
    assert "Traceback" not in process.text
    _assert_whole(folder)


class _Around:
    """A partial function that takes the command last; it must be picklable by its name."""

    def __init__(self, function: partial[int]) -> None:
        self.function = function

    def __call__(self, run: Callable[[], int]) -> int:
        return self.function(run=run)


def test_room_is_compared_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2% are for headers and the blocks of the file system."""
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1020)
    require_room(tmp_path, 1000, "net.safetensors")
    assert room_problem("--output_dir", tmp_path, 1000) is None
    assert room_remark(tmp_path, 1000, 3) is None

    with pytest.raises(TrainingError, match=r"net.safetensors needs 1.0 KB.*has 1.0 KB free"):
        require_room(tmp_path, 1001, "net.safetensors")
    problem = room_problem("--output_dir", tmp_path, 1001)
    assert problem is not None
    assert problem.place == "--output_dir"
    remark = room_remark(tmp_path, 1001, 3)
    assert remark is not None
    assert remark.startswith("the 3 saves of this run need about 1.0 KB")


def test_free_room_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    expected = shutil.disk_usage(tmp_path).free
    assert disk.free_bytes(tmp_path / "not" / "yet") == pytest.approx(expected, rel=0.1)


def test_two_runs_of_one_name_do_not_write_at_once(
    options: MakeOptions, start_process: StartProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = options(max_train_steps=1, plugin=None)
    one = start_process(chosen, hold=("sdxl_train.loop:batch_loss", 1))
    one.wait_until_held()
    argv = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    assert main(argv) == 2
    assert "another run writes files of this name" in capsys.readouterr().err
    assert main([*argv, "--output_name", "other"]) == 0
    one.send(signal.SIGUSR1)
    assert one.wait() == 0
    names = {path.name for path in one.folder.glob("*.safetensors")}
    assert names == {"photo.safetensors", "other.safetensors"}
