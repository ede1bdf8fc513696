"""Help is fast, complete and readable."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from sdxl_train import __version__
from sdxl_train.config import CORE_OPTIONS
from sdxl_train.options import options_of
from sdxl_train.plugins import PluginHost
from sdxl_train.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.core.conftest import Command, Site

HEAVY = ("torch", "diffusers", "transformers", "accelerate")


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("--version",),
        ("plugins",),
        ("components",),
        ("plan", "--seed", "x"),
        ("--seed", "x", "--train_data_dir", "gone"),
        ("--network_module", "nothing"),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(words: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom sdxl_train.cli import main\n"
        f"main({list(words)!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"


def test_help_takes_less_than_half_a_second(command: Command, tmp_path: Path) -> None:
    # As an installed package runs: pip compiles what it installs.
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    libraries = "import importlib.metadata, json, logging, packaging.specifiers, pluggy, pydantic"

    def seconds(run: Callable[[], object]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    def help_() -> None:
        assert command("--help", environment=compiled).returncode == 0

    def imports() -> None:
        code = f"{libraries}\npydantic.BaseModel, pydantic.TypeAdapter"
        environment = {**os.environ, **compiled}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)

    help_()
    imports()
    # On an idle machine the libraries alone take an eighth of a second. How fast this machine is
    # today is none of our doing.
    pairs = [(seconds(help_), seconds(imports)) for _ in range(3)]
    assert min(mine for mine, _ in pairs) < 4 * min(theirs for _, theirs in pairs), pairs


def test_help_lists_every_flag_under_its_owner(site: Site, command: Command) -> None:
    site.add("grain")

    text = command("--plugin", "grain", "--help").stdout

    host = PluginHost()
    host.apply([("grain", "--plugin")], [])
    flags = [name for model in CORE_OPTIONS for name in options_of(model)]
    for entry in Registry(host).all_entries():
        if entry.kind.selector:
            flags += [*entry.flags, *(f"{entry.kind.args} {name}" for name in entry.args)]
    missing = [flag for flag in flags if f"  --{flag}" not in text]
    assert missing == []
    owner = text.index("* grain [plugin grain]: Grain, for tests.")
    assert owner < text.index("--grain X")


@pytest.mark.parametrize("columns", [80, 100, 250])
def test_help_fits_the_screen(command: Command, columns: int) -> None:
    text = command("--help", environment={"COLUMNS": str(columns)}).stdout

    # The usage line is written to be copied, not to be folded.
    lines = [line for line in text.splitlines() if "sdxl-train --pretrained" not in line]
    assert max(len(line) for line in lines) <= max(80, min(columns, 100))


def test_help_tells_choices_defaults_and_ranges(command: Command) -> None:
    text = " ".join(command("--help").stdout.split())

    assert "--lr_scheduler NAME Learning-rate schedule. [constant, " in text
    assert "--mixed_precision no|fp16|bf16" in text
    assert "[default no]" in text
    assert "[>= 0 and < 1]" in text
    assert "--network_args KEY=VALUE ..." in text
    assert "--optimizer_args betas=X,X" in text
    assert "%%" not in text


def test_no_arguments_give_a_short_usage(command: Command) -> None:
    done = command()

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: sdxl-train")
    assert len(done.stderr.splitlines()) < 10


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("plan", "--json"),
        ("cache", "--prune"),
        ("plugins", "--json"),
        ("components", "--json"),
    ],
)
def test_every_command_has_help(command: Command, name: str, switch: str) -> None:
    done = command(name, "--help")

    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: sdxl-train {name}")
    assert switch in done.stdout


GREET = """
from sdxl_train import Command, Field, hookimpl

class Greet(Command):
    \"\"\"Greet somebody.

    Says it as often as asked.
    \"\"\"
    positional = ("who",)
    who: str = Field(description="Whom to greet.")
    times: int = Field(1, ge=1, description="How often.")

    def run(self):
        print(f"hello {self.who} " * self.times)
        return 0

@hookimpl
def register_commands():
    return {"greet": Greet}
"""


def test_a_command_of_a_plugin_runs_and_has_help(site: Site, command: Command) -> None:
    site.add("polite", GREET)

    done = command("greet", "you", "--times", "2")
    assert (done.returncode, done.stdout.strip()) == (0, "hello you hello you")

    text = command("greet", "--help").stdout
    assert text.startswith("usage: sdxl-train greet [WHO] [options]")
    assert "Says it as often as asked." in text
    assert "--times N" in text

    assert "  greet " in command("--plugin", "polite", "--help").stdout


def test_a_command_of_a_plugin_tells_all_that_is_wrong(site: Site, command: Command) -> None:
    site.add("polite", GREET)

    done = command("greet", "you", "me", "--times", "0", "--time", "2")

    assert done.returncode == 2
    assert "sdxl-train greet: unexpected word 'me'" in done.stderr
    assert "--times: '0' is not a whole number >= 1" in done.stderr
    assert "--time: is no option of sdxl-train greet\n      -> did you mean times?" in done.stderr


SUM = """
from sdxl_train import Command, Field, hookimpl

class Sum(Command):
    \"\"\"Add numbers.\"\"\"
    positional = ("numbers",)
    numbers: list[int] = Field(description="What to add.")
    twice: bool = Field(False, description="Double it.")

    def run(self):
        print(sum(self.numbers) * (1 + self.twice))
        return 0

@hookimpl
def register_commands():
    return {"sum": Sum}
"""


def test_a_list_takes_all_words_that_are_left_around_a_switch(site: Site, command: Command) -> None:
    site.add("adder", SUM)

    done = command("sum", "1", "--twice", "2", "3")

    assert (done.returncode, done.stdout.strip()) == (0, "12"), done.stderr


def test_version_is_told(command: Command) -> None:
    assert command("--version").stdout == f"sdxl-train {__version__}\n"
