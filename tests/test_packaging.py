"""The wheel holds the two packages only, and works by itself."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps"]
    command += ["--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_two_packages_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "sdxl_train",
        "sdxl_lora_plugins",
    }


def test_wheel_brings_types_vocabulary_and_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "sdxl_train/py.typed" in names
    assert "sdxl_lora_plugins/py.typed" in names
    assert "sdxl_train/ldm/tokenizer/bpe_simple_vocab_16e6.txt.gz" in names
    assert "sdxl_lora_plugins/commands/plugin_template/pyproject.toml.jinja" in names
    licences = {Path(name).name for name in names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_help_works_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Its dependencies, and nothing else of this environment: no .pth of an editable checkout.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")

    script = "import sdxl_train, sys; print(sdxl_train.__file__); sys.argv[1:] = ['--help']; "
    script += "from sdxl_train.cli import main; sys.exit(main())"
    done = subprocess.run(
        [python, "-c", script], check=True, capture_output=True, text=True, cwd=tmp_path
    )

    where, *text = done.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert any("--network_dim" in line for line in text)
    assert any("--min_snr_gamma" in line for line in text), "the built-in plugin was not found"
