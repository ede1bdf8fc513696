"""``sdxl-train new-plugin`` writes packages that install, pass their tests and are seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sdxl_lora_plugins.commands.new_plugin import NewPlugin
from sdxl_train.components import KINDS
from sdxl_train.errors import UserError
from sdxl_train.loading import load_plugin
from sdxl_train.plugins import FoundPlugin

if TYPE_CHECKING:
    from tests.end_to_end.conftest import MakeOptions

KIND_NAMES = [kind.name for kind in KINDS]
NAME = "glow-worm"
EXAMPLE = Path(__file__).parents[2] / "plugins" / "sdxl-train-example"


def run(*words: object, cwd: Path, path: Path | None = None) -> str:
    """Run a Python tool, as a plugin's author would; it must succeed."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a component of every kind."""
    folder = tmp_path_factory.mktemp("new-plugin")
    kinds = ",".join(KIND_NAMES)
    said = run("sdxl_train", "new-plugin", NAME, "--kind", kinds, cwd=folder)
    assert "pip install -e" in said
    return folder / f"sdxl-train-{NAME}"


@pytest.fixture(scope="module")
def site(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the import path that it is installed to."""
    target = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--target", target)
    run("pip", "install", *options, package, cwd=package)
    return target


def test_the_example_plugin_is_what_the_template_writes(tmp_path: Path) -> None:
    # So the tests, lint and types of the example, which run with ours, are those of the template.
    folder = tmp_path / "sdxl-train-example"
    assert NewPlugin(name="example", kind=KIND_NAMES, dir=folder).run() == 0
    written = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    ours = {path.relative_to(EXAMPLE) for path in EXAMPLE.rglob("*") if path.is_file()}

    assert set(written) - ours == {Path(".github/workflows/test.yml")}
    for name, path in written.items():
        if name in ours:
            assert path.read_bytes() == (EXAMPLE / name).read_bytes(), (
                f"{name}: run sdxl-train new-plugin example --kind ... --dir {EXAMPLE} again"
            )


@pytest.mark.parametrize("kinds", [*KIND_NAMES, "noise,optimizer", ",".join(KIND_NAMES)])
def test_a_package_of_any_kind_is_clean_and_loads(
    kinds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"of-{len(kinds)}-{kinds.partition(',')[0]}"
    monkeypatch.chdir(tmp_path)
    assert NewPlugin(name=name, kind=kinds).run() == 0
    folder = tmp_path / f"sdxl-train-{name}"
    package = f"sdxl_train_{name.replace('-', '_')}"

    run("ruff", "check", "--no-cache", cwd=folder)
    run("ruff", "format", "--check", "--no-cache", cwd=folder)
    monkeypatch.syspath_prepend(str(folder))
    found = FoundPlugin(
        name=name, distribution="", version="", target=str(folder / package / "__init__.py")
    )
    assert sorted(load_plugin(found).components) == sorted(kinds.split(","))


def test_the_plan_sees_the_installed_plugin(
    site: Path, options: MakeOptions, tmp_path: Path
) -> None:
    given = options()
    words = [
        *("--pretrained_model_name_or_path", given["pretrained_model_name_or_path"]),
        *("--train_data_dir", given["train_data_dir"], "--resolution", "64"),
        *("--output_dir", tmp_path, "--output_name", "x", "--max_train_steps", "2"),
        *("--plugin", f"{NAME}>=0.1", "--glow_worm_offset", "0.1"),
        *("--optimizer_type", f"{NAME}:{NAME}", "--optimizer_args", "nesterov=true"),
    ]

    said = run("sdxl_train", "plan", *words, "--json", cwd=tmp_path, path=site)

    assert f'"{NAME}"' in said
    assert '"glow_worm_offset"' in said


@pytest.mark.parametrize("name", ["", "My Plugin", "-x", "x/y", "1x", "class"])
def test_a_name_that_will_not_do_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError, match="will not do"):
        NewPlugin(name=name).run()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine", encoding="utf-8")

    with pytest.raises(UserError, match="exists"):
        NewPlugin(name="x", dir=tmp_path).run()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
