"""What a command is given to work with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from sdxl_train.components import Command, TrainingCommand
from sdxl_train.errors import PluginError, Problem, UserError
from sdxl_train.options import Option, Setting, Words, options_of, suggestion, validate
from sdxl_train.plugins import PluginHost
from sdxl_train.registry import KIND_BY_NAME, Registry, UnknownNameError
from sdxl_train.settings import texts_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sdxl_train.registry import Entry


@dataclass(frozen=True, kw_only=True)
class CoreCommand:
    """A command of the framework itself.

    Attributes:
        summary: What it does, in a line.
        usage: Its help.
    """

    run: Callable[[Invocation], int]
    summary: str
    usage: str


class Invocation:
    """The settings of a command line and the plugins they bring.

    Attributes:
        settings: Options by name, those of ``--config_file`` included.
        leading: Words before the first flag.
        notices: Remarks to pass on to the user.
    """

    def __init__(
        self, settings: dict[str, Setting], leading: list[Setting], notices: list[str]
    ) -> None:
        self.settings = settings
        self.leading = leading
        self.notices = notices

    @cached_property
    def host(self) -> PluginHost:
        """The plugins of this process; none is enabled yet."""
        return PluginHost()

    @property
    def words(self) -> list[str]:
        """The words before the first flag, as typed."""
        return [str(word.value) for word in self.leading]

    def take_switch(self, name: str) -> bool:
        """Take out a flag that stands alone, so that it counts as consumed."""
        setting = self.settings.pop(name, None)
        if setting is None:
            return False
        if setting.value not in (Words(()), True):
            raise UserError.of(setting.place, f"takes no value, got '{setting.value}'")
        return True

    def take_number(self, name: str) -> int | None:
        """Take out a flag whose value is a number of things, at least 1."""
        setting = self.settings.pop(name, None)
        if setting is None:
            return None
        texts = texts_of(setting)
        if len(texts) != 1 or not texts[0].isdecimal() or int(texts[0]) < 1:
            got = " ".join(texts)
            raise UserError.of(setting.place, f"got '{got}', expected a number from 1 up")
        return int(texts[0])

    def refuse_leading(self) -> None:
        """Refuse words that belong to no flag."""
        if self.leading:
            raise UserError(
                Problem(
                    place="command line",
                    message=f"unexpected word {word.place}",
                    remedy="options are written --name value",
                )
                for word in self.leading
            )

    def refuse_flags(self, command: str, known: Iterable[str] = ()) -> None:
        """Refuse every flag but those of the plugin host and the ``known`` ones.

        Of a configuration file, the commands that use this take the plugins only.
        """
        known = [*known, "plugin", "config_file"]
        problems = [
            _no_option(command, name, setting, known)
            for name, setting in self.settings.items()
            if name not in known and setting.origin == "command line"
        ]
        if problems:
            raise UserError(problems)

    def enable_plugins(self) -> list[Problem]:
        """Enable the built-in plugin and those that ``--plugin`` names; give what is wrong."""
        problems: list[Problem] = []
        setting = self.settings.get("plugin")
        place = setting.place if setting else "--plugin"
        self.host.apply([(name, place) for name in texts_of(setting)], problems)
        return problems

    def registry(self) -> Registry:
        """Enable the plugins and give their components.

        Raises:
            UserError: If one of the plugins cannot be enabled.
        """
        problems = self.enable_plugins()
        if problems:
            raise UserError(problems)
        return Registry(self.host)

    def find_command(self, name: str, core_commands: Iterable[str]) -> Entry:
        """Find a plugin's command by name.

        Raises:
            UserError: If no plugin has it.
        """
        registry, kind = self.registry(), KIND_BY_NAME["command"]
        try:
            return registry.find(kind, name)
        except UnknownNameError as error:
            if ":" in name or "." in name:
                raise UserError.of("command line", str(error)) from None
            known = [*core_commands, *(entry.name for entry in registry.entries(kind))]
            hint = suggestion(name, known) or "see `sdxl-train --help`"
            raise UserError.of("command line", f"there is no command '{name}'", hint) from None
        except PluginError as error:
            raise UserError.of("command line", str(error)) from None

    def build_command(self, entry: Entry) -> Command:
        """Build a plugin's command from the settings, positional words included.

        Raises:
            UserError: With everything that is wrong with them.
        """
        component = entry.component
        assert issubclass(component, Command)
        known = options_of(component)
        settings: dict[str, Setting] = {}
        training: dict[str, Setting] = {}
        problems: list[Problem] = []
        spare = list(self.leading)
        for given, setting in self.settings.items():
            name = component.short.get(given, given)
            if name in known:
                settings[name], left = _own_words(known[name], setting)
                spare += left
            elif issubclass(component, TrainingCommand):
                training[name] = setting
            elif name not in ("plugin", "config_file"):
                problems.append(_no_option(entry.name, name, setting, list(known)))
        for name in component.positional:
            if spare and name not in settings:
                taken = len(spare) if known[name].is_list else 1
                settings[name] = _joined(spare[:taken])
                del spare[:taken]
        problems += [
            Problem(place=f"sdxl-train {entry.name}", message=f"unexpected word {word.place}")
            for word in spare
        ]
        command = validate(component, settings, problems)
        if problems or command is None:
            raise UserError(problems)
        assert isinstance(command, Command)
        if isinstance(command, TrainingCommand):
            training.pop("config_file", None)  # whose values are among the others
            command.with_training(training)
        return command


def _own_words(option: Option, setting: Setting) -> tuple[Setting, list[Setting]]:
    """Split the words after a command's flag into its own and those that are positional."""
    if option.is_list or not isinstance(setting.value, Words):
        return setting, []
    words = setting.value.words
    takes_none = option.is_switch and words[:1] not in (("true",), ("false",))
    own = 0 if takes_none else 1
    return replace(setting, value=Words(words[:own])), [
        Setting(value=Words((word,)), place=repr(word), origin=setting.origin)
        for word in words[own:]
    ]


def _joined(words: Sequence[Setting]) -> Setting:
    """Give positional words as the value of one option."""
    texts = tuple(
        text for word in words if isinstance(word.value, Words) for text in word.value.words
    )
    place = " ".join(word.place for word in words)
    return Setting(value=Words(texts), place=place, origin=words[0].origin)


def _no_option(command: str, name: str, setting: Setting, known: Sequence[str]) -> Problem:
    return Problem(
        place=setting.place,
        message=f"is no option of sdxl-train {command}",
        remedy=suggestion(name, known),
    )
