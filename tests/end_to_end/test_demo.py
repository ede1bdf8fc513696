"""``sdxl-train demo``: the first thing that a newcomer runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from sdxl_lora_plugins.commands.demo_folder import DemoFolder
from sdxl_train import UserError
from sdxl_train.cli import main

LORA_STEPS = 80
# With fewer of the base model, how an optimizer rounds decides how well shapes are told apart.
FEWER_STEPS = ["--base_steps", "200", "--steps", str(LORA_STEPS)]

NO_NETWORK = """
import os, sys

def refuse(event, arguments):
    is_remote = event == "socket.connect" and isinstance(arguments[1], tuple)
    if is_remote or event == "socket.getaddrinfo":
        sys.stderr.write(f"network: {event} {arguments}\\n")
        sys.stderr.flush()
        os._exit(99)

sys.addaudithook(refuse)
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A demo that has run in the folder ``cwd``, with an empty home and no network."""

    code: int
    stdout: str
    stderr: str
    cwd: Path
    home: Path

    @property
    def folder(self) -> Path:
        return self.cwd / "sdxl-train-demo"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    cwd, home, site = (tmp_path_factory.mktemp(name) for name in ("cwd", "home", "site"))
    (site / "sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "TORCH"))}
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [Path(sysconfig.get_path("scripts")) / "sdxl-train", "demo", *FEWER_STEPS],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env={**kept, "HOME": str(home), "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    return Outcome(code=done.returncode, stdout=done.stdout, stderr=done.stderr, cwd=cwd, home=home)


def test_demo_runs_offline_to_its_end_and_says_where_things_are(demo: Outcome) -> None:
    assert demo.code == 0, demo.stderr
    for name in ("lora/zog.safetensors", "before-after.png", "before.png", "after.png"):
        assert (demo.folder / name).is_file()
    assert "sdxl-train-demo/lora/zog.safetensors" in demo.stdout
    assert "sdxl-train-demo/before-after.png" in demo.stdout
    assert demo.stdout.splitlines()[-1].endswith(str(demo.folder.resolve()))


def test_demo_writes_nothing_outside_its_folder_but_the_scan_index(demo: Outcome) -> None:
    assert list(demo.cwd.iterdir()) == [demo.folder]
    outside = [path for path in demo.home.rglob("*") if path.is_file()]
    assert {path.parent for path in outside} <= {demo.home / ".cache" / "sdxl-train" / "scan"}


def test_demo_speaks_little_and_warns_of_nothing(demo: Outcome) -> None:
    lines = demo.stderr.splitlines()
    assert len(lines) < 25
    assert [line for line in lines if "warn" in line.lower()] == []
    assert "\r" not in demo.stderr


def test_lora_of_the_demo_lowers_the_loss_markedly(demo: Outcome) -> None:
    record = json.loads((demo.folder / "demo.json").read_text(encoding="utf-8"))
    assert record["status"] == "complete"
    assert record["loss_after"] < 0.7 * record["loss_before"]
    assert f"{record['loss_before']:.3f} without" in demo.stdout
    assert f"{record['loss_after']:.3f} with" in demo.stdout


def test_lora_of_the_demo_changes_zogs_and_spares_the_other_shapes(demo: Outcome) -> None:
    before, after = (
        np.asarray(Image.open(demo.folder / name)).astype(int)
        for name in ("before.png", "after.png")
    )
    # Below the title, one row of pictures for each of four prompts; the first is the zog.
    changes = np.abs(after - before)[-4 * 102 :]
    zog, *others = [change.mean() for change in np.split(changes, 4)]
    assert zog > 2 * max(others)


def test_file_of_the_demo_holds_a_trained_unet(demo: Outcome) -> None:
    with safe_open(demo.folder / "lora" / "zog.safetensors", framework="pt") as file:
        ups = [key for key in file.keys() if key.endswith("lora_up.weight")]  # noqa: SIM118
        assert ups
        assert all(key.startswith("lora_unet_") for key in ups)
        assert all(file.get_tensor(key).any() for key in ups)


def test_options_of_the_demo_make_the_same_run_again(
    demo: Outcome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo.cwd)
    assert main(["plan", "--config_file", "sdxl-train-demo/lora.toml", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["steps"]["optimizer_steps"] == LORA_STEPS
    assert planned["saves"] == [LORA_STEPS]


def test_demo_leaves_a_folder_of_something_else_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine", encoding="utf-8")
    assert main(["demo", str(tmp_path)]) == 2
    assert "is not a demo" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [mine]


def test_demo_refuses_a_file_in_place_of_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="is not a folder"):
        DemoFolder.claim(file)
    with pytest.raises(UserError, match="cannot be written"):
        DemoFolder.claim(file / "below")


def test_record_of_another_program_is_no_demo(tmp_path: Path) -> None:
    for content in ("[]", "not JSON", '{"made_by": "someone else"}'):
        (tmp_path / "demo.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="not a demo"):
            DemoFolder.claim(tmp_path)


def test_earlier_demo_is_replaced_but_for_what_the_user_added(
    demo: Outcome, tmp_path: Path
) -> None:
    old = tmp_path / "demo"
    shutil.copytree(demo.folder, old)
    (old / "notes.txt").write_text("mine", encoding="utf-8")
    DemoFolder.claim(old)
    assert sorted(path.name for path in old.iterdir()) == ["demo.json", "notes.txt"]


def test_command_is_known_without_importing_torch() -> None:
    code = (
        "import sys; import sdxl_lora_plugins as p; p.register_commands()['demo'](); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
