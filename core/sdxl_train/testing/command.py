"""The contract of commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from sdxl_train.cli.help import command_help
from sdxl_train.components import Command
from sdxl_train.errors import UserError
from sdxl_train.options import options_of
from sdxl_train.registry import KIND_BY_NAME, Entry
from sdxl_train.testing.contract import Contract, untouched_process

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


_LINE = 100


class CommandContract(Contract[Command]):
    """Does its work in the current folder, and tells how that ended by its exit code."""

    mistakes: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Changes of the options that it must refuse as the user's mistake."""

    def prepare(self, folder: Path) -> None:
        """Put what the command with its ``options`` needs into ``folder``, the current one."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The current folder, prepared."""
        monkeypatch.chdir(tmp_path)
        self.prepare(tmp_path)
        return tmp_path

    def test_help_tells_all_of_it(self) -> None:
        """``sdxl-train NAME --help`` says what it does and has a line for each option."""
        entry = Entry(
            kind=KIND_BY_NAME["command"], name="contract", component=self.component, plugin="mine"
        )
        text = command_help(entry)
        first = (self.component.__doc__ or "").strip().partition("\n")[0]
        assert first in text
        assert len(first) <= _LINE, f"its first line has {len(first)} letters, of {_LINE} in lists"
        silent = [
            name
            for name in options_of(self.component)
            if f"--{name}" not in text and name.upper() not in text
        ]
        assert not silent, f"help does not mention {', '.join(silent)}"

    def test_positional_words_are_options(self) -> None:
        """What may be given without a flag is declared, and only the last may be a list."""
        known = options_of(self.component)
        unknown = [name for name in self.component.positional if name not in known]
        assert not unknown, f"no such option: {', '.join(unknown)}"
        lists = [name for name in self.component.positional[:-1] if known[name].is_list]
        assert not lists, f"{', '.join(lists)} would take the words of those behind it"

    def test_it_succeeds(self, folder: Path) -> None:
        """With the options under test its exit code is 0, and the process is as it was."""
        with untouched_process(draws=True):
            code = self.make().run()
        assert type(code) is int, f"run() gives {code!r}, not an exit code"
        assert code == 0, f"the exit code is {code}"

    def test_mistakes_are_refused(self, folder: Path) -> None:
        """A user's mistake is a UserError, which ends the command with exit code 2."""
        for changes in self.mistakes:
            before = sorted(path.name for path in folder.iterdir())
            with pytest.raises(UserError):
                self.make(**changes).run()
            after = sorted(path.name for path in folder.iterdir())
            assert after == before, f"{changes} is refused, but leaves files: {after}"
