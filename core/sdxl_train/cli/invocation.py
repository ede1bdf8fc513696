"""What a command is given to work with."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from sdxl_train.components import Command
from sdxl_train.errors import Problem, UserError
from sdxl_train.options import Setting, Words, options_of, suggestion, validate
from sdxl_train.plugins import PluginError, PluginHost
from sdxl_train.registry import KIND_BY_NAME, Registry, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdxl_train.registry import Entry


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

    def take(self, name: str) -> Setting | None:
        """Take a setting out, so that it counts as consumed."""
        return self.settings.pop(name, None)

    def take_switch(self, name: str) -> bool:
        """Take a flag that stands alone."""
        setting = self.take(name)
        if setting is None:
            return False
        if setting.value not in (Words(()), True):
            raise UserError.of(setting.place, f"takes no value, got '{setting.value}'")
        return True

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

    def enable_plugins(self) -> Registry:
        """Enable the built-in plugin and those that ``--plugin`` names.

        Raises:
            UserError: If one of them cannot be enabled.
        """
        problems: list[Problem] = []
        setting = self.settings.get("plugin")
        names: list[tuple[str, str]] = []
        if setting is not None:
            words = setting.value.words if isinstance(setting.value, Words) else setting.value
            listed: Sequence[object] = words if isinstance(words, (list, tuple)) else [words]
            names = [(str(word), setting.place) for word in listed]
        self.host.apply(names, problems)
        if problems:
            raise UserError(problems)
        return Registry(self.host)

    def run_plugin_command(self, name: str, core_commands: Sequence[str]) -> int:
        """Find the command that a plugin registers, give it its options, and run it."""
        command = self.build_command(self.find_command(name, core_commands))
        return command.run()

    def find_command(self, name: str, core_commands: Sequence[str]) -> Entry:
        """Find a plugin's command by name.

        Raises:
            UserError: If no plugin has it.
        """
        registry = self.enable_plugins()
        try:
            return registry.find(KIND_BY_NAME["command"], name)
        except UnknownNameError as error:
            known = [entry.name for entry in registry.entries(KIND_BY_NAME["command"])]
            hint = suggestion(name, [*core_commands, *known])
            raise UserError.of("command line", str(error), hint) from None
        except PluginError as error:
            raise UserError.of("command line", str(error)) from None

    def build_command(self, entry: Entry) -> Command:
        """Build a command from the settings, positional words included.

        Raises:
            UserError: With everything that is wrong with them.
        """
        component = entry.component
        assert issubclass(component, Command)
        settings = {name: value for name, value in self.settings.items() if name != "plugin"}
        problems: list[Problem] = []
        spare = list(self.leading)
        for name in component.positional:
            if spare and name not in settings:
                settings[name] = spare.pop(0)
        problems += [
            Problem(place=f"sdxl-train {entry.name}", message=f"unexpected word {word.place}")
            for word in spare
        ]
        known = options_of(component)
        for name in sorted(set(settings) - set(known)):
            problems.append(
                Problem(
                    place=settings.pop(name).place,
                    message=f"is no option of sdxl-train {entry.name}",
                    remedy=suggestion(name, list(known)),
                )
            )
        command = validate(component, settings, problems)
        if problems or command is None:
            raise UserError(problems)
        assert isinstance(command, Command)
        return command
