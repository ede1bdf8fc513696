"""What the documents promise, the program does."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sdxl_train.cli import main
from sdxl_train.config import CORE_OPTIONS
from sdxl_train.options import options_of
from sdxl_train.plugins import PluginHost
from sdxl_train.registry import Registry
from sdxl_train.resolve import Resolver
from sdxl_train.settings import from_words

if TYPE_CHECKING:
    from sdxl_train.testing import TrainTiny

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def _blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def _known_flags() -> set[str]:
    host = PluginHost()
    host.apply([], [])
    registry = Registry(host)
    flags = {name for model in CORE_OPTIONS for name in options_of(model)}
    return flags | {name for entry in registry.all_entries() for name in entry.flags}


def test_readme_plugin_acts_in_a_run(tmp_path: Path) -> None:
    (code,) = _blocks(ROOT / "README.md", "python")
    plugin = tmp_path / "my_noise.py"
    plugin.write_text(code, encoding="utf-8")
    words = f"--plugin {plugin} --channel_offset 0.05 --output_dir out"
    words += " --pretrained_model_name_or_path base.safetensors"
    settings, _ = from_words(words.split(), [])
    host = PluginHost()

    resolution = Resolver(settings, host, Registry(host)).resolve()

    assert resolution.problems == []
    assert resolution.config is not None
    (noise,) = resolution.config.noises
    assert noise.model_dump() == {"channel_offset": 0.05}


def test_readme_training_command_has_no_mistake_but_its_missing_files(tmp_path: Path) -> None:
    (block,) = [b for b in _blocks(ROOT / "README.md", "sh") if "--train_data_dir" in b]
    words = block.replace("\\\n", " ").split()[1:]
    done = subprocess.run(
        [sys.executable, "-m", "sdxl_train", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert "2 problems" in done.stderr
    assert "sd_xl_base_1.0.safetensors" in done.stderr
    assert "images does not exist" in done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_in_the_documents_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    commands = "\n".join(re.findall(r"sdxl-train[^`]*", text))
    mentioned = set(re.findall(r"--([a-z][a-z0-9_]+)", commands))
    elsewhere = {"json", "schema", "write", "help", "channel_offset", "half_tilt", "check"}
    # Of the framework's own commands.
    elsewhere |= {"prune", "import_npz", "num_processes", "plot", "memory"}
    # Of plugins that come with the checkout.
    elsewhere |= {"v2"}
    assert mentioned - elsewhere - _known_flags() == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    missing = [t for t in targets if "://" not in t and not (document.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", ["reference.md", "api.txt"])
def test_what_is_made_from_the_code_is_up_to_date(page: str) -> None:
    script = ROOT / "docs" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    written = (ROOT / "docs" / page).read_text(encoding="utf-8")

    # A change of api.txt is one of the public interface: it belongs in the changelog too.
    assert module.PAGES[page]() == written, "run python docs/make_reference.py"


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plugins" / "index.html").is_file()


def test_plugins_of_the_tutorial_act(
    tmp_path: Path, train_tiny: TrainTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    noise, tracker, command = _blocks(ROOT / "docs" / "plugins.md", "python")
    files = {"half_tilt": noise, "loss_lines": tracker, "keys": command}
    for name, code in files.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    plain = train_tiny(network_train_unet_only=True)
    run = train_tiny(
        network_train_unet_only=True,
        plugin=[tmp_path / "half_tilt.py", tmp_path / "loss_lines.py"],
        half_tilt=1.0,
        loss_lines=2,
    )
    printed = capsys.readouterr().out

    assert run.losses[0] != plain.losses[0]
    assert f"step 2: loss {run.losses[1]:.4f}" in printed
    assert "step 3" not in printed
    assert main(["keys", str(run.path), "--plugin", str(tmp_path / "keys.py")]) == 0
    assert capsys.readouterr().out.split() == sorted(run.tensors)
