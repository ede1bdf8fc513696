"""Editors check files of options and datasets against schemas made of the declarations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sdxl_train.config import CORE_OPTIONS
from sdxl_train.options import options_of
from sdxl_train.plugins import PluginHost
from sdxl_train.registry import Registry
from sdxl_train.schemas import dataset_schema, run_schema

if TYPE_CHECKING:
    from tests.core.conftest import Command, Site

TAPLO = Path(sys.executable).with_name("taplo")
GOOD_RUN = """
pretrained_model_name_or_path = "base.safetensors"
plugins = ["lycoris"]
[group.of_my_own]
learning_rate = 1e-4
optimizer_type = "adamw"
lr_scheduler = "python:Mine"
lr_warmup_steps = "10%"
resolution = "1024,768"
noise = "my_package.Noise"
sample_every_n_steps = 10
[network]
network_module = "networks.lora"
network_args = ["conv_dim=4"]
"""
GOOD_DATASET = """
[general]
resolution = [1024, 768]
[[datasets]]
batch_size = 2
[[datasets.subsets]]
image_dir = "images"
num_repeats = 10
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the installed command wrote its schemas to."""
    folder = tmp_path_factory.mktemp("schemas")
    subprocess.run(
        [sys.executable, "-m", "sdxl_train", "schema", "--write", str(folder)], check=True
    )
    return folder


def complaints(folder: Path, name: str, text: str) -> str:
    """What the language server of editors says of a file."""
    (folder / name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [TAPLO, "check", "--colors", "never", name],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else done.stderr


@pytest.mark.parametrize(
    ("name", "text"), [("my_run.toml", GOOD_RUN), ("my_dataset.toml", GOOD_DATASET)]
)
def test_editors_accept_what_a_run_accepts(folder: Path, name: str, text: str) -> None:
    assert complaints(folder, name, text) == ""


@pytest.mark.parametrize(
    "line",
    [
        "learning_rat = 1e-4",
        'learning_rate = "1e-4"',
        'lr_warmup_steps = "10"',
        'optimizer_type = "adamw9"',
        "max_train_steps = 0",
        "network_args = { con_dim = 4 }",
        "output_config = true",
    ],
)
def test_editors_mark_a_mistake_in_options(folder: Path, line: str) -> None:
    assert "run.toml:1:" in complaints(folder, "run.toml", line)


@pytest.mark.parametrize(
    "line", ["keep_tokens = -1", "num_repeat = 2", 'flip_aug = "yes"', "resolution = []"]
)
def test_editors_mark_a_mistake_in_a_dataset(folder: Path, line: str) -> None:
    assert "dataset.toml:9:" in complaints(folder, "dataset.toml", f"{GOOD_DATASET}{line}")


def test_every_option_is_there_with_its_words() -> None:
    host = PluginHost()
    host.apply([], [])
    registry = Registry(host)
    properties = run_schema(registry)["properties"]
    declared = {
        name: option
        for model in (*CORE_OPTIONS, *(entry.component for entry in registry.all_entries()))
        for name, option in options_of(model).items()
        if not option.args and getattr(model, "run", None) is None
    }

    assert set(declared) - set(properties) == {"config_file", "output_config"}
    assert all(properties[name]["description"] for name in declared if name in properties)


def test_every_key_of_a_dataset_file_is_described() -> None:
    tables: dict[str, Any] = dataset_schema()["$defs"]
    silent = {
        name
        for table in tables.values()
        for name, schema in table["properties"].items()
        if not schema.get("description")
    }

    assert silent <= {"subsets"}


def test_options_of_installed_plugins_are_there(site: Site, command: Command) -> None:
    site.add("grain")

    documents = json.loads(command("components", "--schema").stdout)

    assert documents == json.loads(command("schema").stdout)
    assert list(documents) == ["run.schema.json", "dataset.schema.json"]
    grain = documents["run.schema.json"]["properties"]["grain"]
    assert grain["description"] == "Strength of the grain."


def test_a_binding_of_the_user_stays(command: Command, tmp_path: Path) -> None:
    (tmp_path / ".taplo.toml").write_text("[formatting]\n", encoding="utf-8")

    done = command("schema", "--write", str(tmp_path))

    assert (tmp_path / ".taplo.toml").read_text(encoding="utf-8") == "[formatting]\n"
    assert "is yours and stays as it is" in done.stderr
    assert command("schema", "--write", str(tmp_path / "gone")).returncode == 2
