"""Collect what the user gave: words of a command line, keys of a TOML file, or a Python dict."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_train.components import KINDS
from sdxl_train.errors import Problem, UserError
from sdxl_train.options import Setting, Words
from sdxl_train.toml_files import KeyPath, read_toml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

REPEATABLE = ("plugin", *(kind.selector for kind in KINDS if kind.stacked))
"""Options whose values add up when they are given again; of others the last one wins."""

_FLAG = re.compile(r"--.|-[A-Za-z]$")
"""``-r`` is a flag too, for the commands that know it; ``-1`` is a value."""
_TABLES = tuple(kind.args for kind in KINDS if kind.args)
_PLURALS = {"plugins": "plugin"}
"""The key of a list reads better in the plural."""
_COMMAND_LINE_ONLY = ("config_file", "output_config")


def from_words(
    words: Sequence[str], notices: list[str]
) -> tuple[dict[str, Setting], list[Setting]]:
    """Read a command line.

    A flag owns the words up to the next flag, so reading needs no knowledge of the flags, and
    ``-1`` is a value. Hyphens and underscores in the name of a flag are the same.

    Returns:
        The settings by option name, and the words before the first flag.
    """
    leading, groups = _flag_groups(words)
    settings: dict[str, Setting] = {}
    for flag, values in groups:
        name = _normal(flag.lstrip("-"))
        given = Words(tuple(values))
        before = settings.get(name)
        if before is not None and isinstance(before.value, Words):
            if name in REPEATABLE:
                given = Words((*before.value.words, *given.words))
            else:
                notices.append(f"{flag} is given twice: '{given}' wins over '{before.value}'")
        settings[name] = Setting(value=given, place=flag, origin="command line")
    return settings, [
        Setting(value=Words((word,)), place=repr(word), origin="command line") for word in leading
    ]


def _flag_groups(words: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    leading: list[str] = []
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if _FLAG.match(word):
            flag, equals, value = word.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            leading.append(word)
    return leading, groups


def from_file(path: Path) -> dict[str, Setting]:
    """Read a TOML file of options. Its tables only group, whatever their names and depth.

    Raises:
        UserError: If the file cannot be read, or an option stands in it twice.
    """
    document, lines = read_toml(path)
    settings: dict[str, Setting] = {}
    problems: list[Problem] = []
    for keys, value in _leaves(document):
        name = _normal(str(keys[-1]))
        name = _PLURALS.get(name, name)
        setting = _setting_in_file(value, path, keys, lines)
        if name in settings:
            message, remedy = f"stands twice, before at {settings[name].place}", "remove one"
            problems.append(Problem(place=setting.place, message=message, remedy=remedy))
        settings.setdefault(name, setting)
    _refuse_recursion(settings, problems)
    return settings


def _setting_in_file(
    value: object, path: Path, keys: KeyPath, lines: Mapping[KeyPath, int]
) -> Setting:
    line = lines.get(keys)
    origin = f"{path}:{line}" if line else str(path)
    inner = value if isinstance(value, dict) else {}
    return Setting(
        value=value,
        place=f"{origin} {'.'.join(str(key) for key in keys)}",
        origin=origin,
        keys={
            _normal(key): _setting_in_file(item, path, (*keys, key), lines)
            for key, item in inner.items()
        },
    )


def _refuse_recursion(settings: Mapping[str, Setting], problems: list[Problem]) -> None:
    """Refuse what names another file, and raise what is wrong."""
    for name in _COMMAND_LINE_ONLY:
        if name in settings:
            message = "is for the command line only"
            place = settings[name].place
            problems.append(Problem(place=place, message=message, remedy="remove it"))
    if problems:
        raise UserError(problems)


def _leaves(table: Mapping[str, Any], above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and _normal(key) not in _TABLES:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def from_mapping(options: Mapping[str, Any]) -> dict[str, Setting]:
    """Take options from Python; paths may be ``Path`` objects.

    Raises:
        UserError: If one of them is for the command line only.
    """
    settings = {
        _PLURALS.get(name, name): _setting_in_python(value, f"option {name}")
        for name, value in options.items()
    }
    _refuse_recursion(settings, [])
    return settings


def _setting_in_python(value: object, place: str) -> Setting:
    if isinstance(value, Setting):  # a command passes on what it was given
        return value
    inner = value if isinstance(value, dict) else {}
    return Setting(
        value=str(value) if isinstance(value, Path) else value,
        place=place,
        origin="python",
        keys={key: _setting_in_python(item, f"{place}.{key}") for key, item in inner.items()},
    )


def config_path(setting: Setting) -> Path:
    """Give the file that ``--config_file`` names; the ending ``.toml`` may be left out.

    Raises:
        UserError: If it names none, or several.
    """
    words = setting.value.words if isinstance(setting.value, Words) else (str(setting.value),)
    if len(words) != 1 or not words[0]:
        raise UserError.of(setting.place, f"got '{' '.join(words)}', expected one TOML file")
    path = Path(words[0]).expanduser()
    return path if path.suffix == ".toml" else path.with_name(f"{path.name}.toml")


def is_on(setting: Setting | None) -> bool:
    """Tell whether a flag that stands alone is given."""
    return setting is not None and setting.value in (Words(()), Words(("true",)), True)


def merge(command_line: dict[str, Setting], notices: list[str]) -> dict[str, Setting]:
    """Put the settings of ``--config_file``, if one is named, below those of the command line.

    Raises:
        UserError: As :func:`from_file`.
    """
    named = command_line.get("config_file")
    # With output_config, the file is the one to write.
    if named is None or is_on(command_line.get("output_config")):
        return command_line
    settings = from_file(config_path(named))
    for name, given in command_line.items():
        below = settings.get(name)
        if below is not None and name in REPEATABLE:
            given = _joined(below, given)
        elif below is not None and name in _TABLES:
            notices.append(f"{given.place} replaces all of {below.place}")
        settings[name] = given
    return settings


def _joined(below: Setting, above: Setting) -> Setting:
    """Join the values of an option that adds up."""
    texts = [text for setting in (below, above) for text in texts_of(setting)]
    return Setting(
        value=Words(tuple(texts)),
        place=f"{below.place} and {above.place}",
        origin=f"{below.origin} and {above.origin}",
    )


def texts_of(setting: Setting | None) -> list[str]:
    """Give the values of an option that takes several texts."""
    if setting is None:
        return []
    value = setting.value.words if isinstance(setting.value, Words) else setting.value
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]


def _normal(name: str) -> str:
    return name.replace("-", "_")
