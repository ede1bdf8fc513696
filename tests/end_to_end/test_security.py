"""What files may do: nothing but be read. What may be seen of secrets: nothing."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from sdxl_train import UserError
from sdxl_train.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import MakeOptions, Planned, TrainLora


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def evil_bytes(marker: Path, form: str) -> bytes:
    """A pickle as each library of the ecosystem writes them."""
    evil = {"state_dict": Evil(marker)}
    if form == "plain":
        return pickle.dumps(evil)
    out = io.BytesIO()
    if form == "numpy":
        np.savez(out, latents=np.array([Evil(marker)], dtype=object))
    else:
        torch.save(evil, out, _use_new_zipfile_serialization=form == "zip")
    return out.getvalue()


def test_the_payload_works(marker: Path) -> None:
    """Otherwise the other tests would prove nothing."""
    for form in ("plain", "zip", "old"):
        data = io.BytesIO(evil_bytes(marker, form))
        loaded = pickle.load(data) if form == "plain" else torch.load(data, weights_only=False)
        assert "state_dict" in loaded
        assert marker.exists()
        marker.rmdir()


@pytest.mark.parametrize("form", ["plain", "zip", "old"])
@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("pretrained_model_name_or_path", "model.ckpt"),
        ("pretrained_model_name_or_path", "model.safetensors"),
        ("vae", "vae.pt"),
        ("network_weights", "network.pt"),
        ("network_weights", "network.safetensors"),
    ],
)
def test_a_malicious_pickle_is_never_executed(
    option: str, name: str, form: str, marker: Path, planned: Planned, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(evil_bytes(marker, form))
    code, text = planned([f"--{option}", str(path)])
    assert not marker.exists()
    assert code == 2
    assert name in text


@pytest.mark.parametrize("command", ["inspect", "convert", "resize", "merge", "extract"])
def test_tools_execute_no_pickle(
    command: str,
    marker: Path,
    tmp_path: Path,
    tiny_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "network.pt"
    path.write_bytes(evil_bytes(marker, "zip"))
    out = str(tmp_path / "out.safetensors")
    words = {
        "inspect": [str(path)],
        "convert": ["--model", str(path), "--save_to", out],
        "resize": ["--model", str(path), "--save_to", out, "--new_rank", "2"],
        "merge": ["--models", str(path), "--save_to", out],
        "extract": ["--model_org", str(tiny_file), "--model_tuned", str(path), "--save_to", out],
    }[command]
    assert main([command, *words]) == 2
    assert not marker.exists()
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_states_and_caches_with_pickles_execute_nothing(
    marker: Path, train_lora: TrainLora, photographs: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(photographs, tmp_path / "data")
    for image in (data / "2_photo").glob("*.png"):
        for ending in ("_sdxl.npz", "_0064x0064_sdxl.npz", "_te_outputs.npz"):
            image.with_name(image.stem + ending).write_bytes(evil_bytes(marker, "numpy"))
    common: dict[str, Any] = {
        "train_data_dir": str(data),
        "cache_latents": True,
        "cache_latents_to_disk": True,
        "lr_scheduler": "constant",
    }
    first = train_lora(**common, max_train_steps=1, save_state=True)
    assert not marker.exists()

    state = first.folder / "photo-state"
    # As accelerate lays out its states; nothing of it is looked at.
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "pytorch_model.bin"):
        (state / name).write_bytes(evil_bytes(marker, "zip"))
    again = train_lora(**common, max_train_steps=2, resume=str(state))
    assert [step["step"] for step in again.steps] == [2]
    assert not marker.exists()

    for name in ("parameters.safetensors", "optimizer.safetensors"):
        broken = shutil.copytree(state, tmp_path / name / "photo-state")
        (broken / name).write_bytes(evil_bytes(marker, "zip"))
        with pytest.raises(UserError, match=f"{name}: is corrupt"):
            train_lora(**common, max_train_steps=2, resume=str(broken))
    assert not marker.exists()


def test_nothing_is_imported_from_the_folders_of_a_run(
    tmp_path: Path, options: MakeOptions, photographs: Path, marker: Path
) -> None:
    """Modules of the names that a run imports lie in all of its folders."""
    data = shutil.copytree(photographs, tmp_path / "data")
    config = tmp_path / "config"
    here = tmp_path / "here"
    code = f"open({str(marker)!r}, 'w')\n"
    for folder in (data, data / "2_photo", config, here):
        folder.mkdir(exist_ok=True)
        for name in (
            "torch",
            "sdxl_train",
            "sdxl_lora_plugins",
            "conftest",
            "sitecustomize",
            "tomli",
        ):
            (folder / f"{name}.py").write_text(code, encoding="utf-8")
        for name in ("toxfile.py", "setup.py", ".pth"):
            (folder / name).write_text(code, encoding="utf-8")
    file = config / "run.toml"
    file.write_text("seed = 1\n", encoding="utf-8")
    chosen = options(train_data_dir=str(data), plugin=None, seed=None)
    words = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    installed = os.path.join(os.path.dirname(sys.executable), "sdxl-train")  # noqa: PTH118, PTH120
    done = subprocess.run(
        [installed, "plan", "--config_file", str(file), *words],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not marker.exists()


def test_the_hub_is_asked_for_hub_ids_only(
    train_lora: TrainLora, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with local files opens no connection, whatever the environment offers."""
    import socket

    asked: list[object] = []

    def refuse(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            asked.append(address)
            raise ConnectionRefusedError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    run = train_lora(max_train_steps=1)
    assert run.result.exit_code == 0
    assert asked == []


def test_code_of_models_is_never_trusted() -> None:
    from sdxl_lora_plugins import model

    assert model.__file__ is not None
    folder = os.path.dirname(model.__file__)  # noqa: PTH120
    for name in os.listdir(folder):  # noqa: PTH208
        if name.endswith(".py"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:  # noqa: PTH118, PTH123
                assert "trust_remote_code=True" not in file.read()


def test_archives_are_no_models_and_no_images(tmp_path: Path, planned: Planned) -> None:
    """Nothing is unpacked, so that no name in an archive can lead anywhere."""
    archive = tmp_path / "model.safetensors"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../escaped.txt", "out")
    code, text = planned(["--pretrained_model_name_or_path", str(archive)])
    assert code == 2
    assert "model.safetensors" in text
    data = tmp_path / "data" / "1_cat"
    data.mkdir(parents=True)
    shutil.copy(archive, data / "a.png")
    shutil.copy(archive, data / "images.zip")
    code, text = planned(["--train_data_dir", str(data.parent)])
    assert code == 2
    assert "a.png" in text
    assert not list(tmp_path.parent.glob("escaped.txt"))


SECRETS = {
    "HF_TOKEN": "hf_s3cret0fTheHub",
    "HUGGING_FACE_HUB_TOKEN": "hf_0lds3cret",
    "WANDB_API_KEY": "s3cret0fTheTracker",
    "AWS_SECRET_ACCESS_KEY": "s3cret0fTheCloud",
}


def test_secrets_of_the_environment_reach_no_file_and_no_log(
    train_lora: TrainLora,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    run = train_lora(max_train_steps=1, save_state=True, progress=True)
    written = b"".join(path.read_bytes() for path in run.folder.rglob("*") if path.is_file())
    told = "".join(capfd.readouterr()) + caplog.text
    assert b"ss_network_dim" in written
    for secret in SECRETS.values():
        assert secret.encode() not in written
        assert secret not in told


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lets a process do it")
def test_a_secret_of_the_command_line_leaves_the_process_list() -> None:
    code = (
        "import sys; from sdxl_train.cli.console import hide_from_process_list as hide\n"
        "hide(['s3cret']); print(open('/proc/self/cmdline').read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--key", "s3cret", "--key=s3cret", "seen"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.rstrip("\0\n").split("\0")[-4:] == [
        "--key",
        "******",
        "--key=******",
        "seen",
    ]
