"""Collect what the user gave: words of a command line, keys of a TOML file, or a Python dict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_train.components import KINDS
from sdxl_train.errors import Problem, UserError
from sdxl_train.options import Setting, Words
from sdxl_train.toml_files import KeyPath, read_toml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

REPEATABLE = ("plugin", *(kind.selector for kind in KINDS if kind.stacked))
"""Options whose values add up when the flag is given again; of others the last one wins."""

_TABLES = tuple(kind.args for kind in KINDS if kind.args)


def from_words(
    words: Sequence[str], notices: list[str]
) -> tuple[dict[str, Setting], list[Setting]]:
    """Read a command line.

    A flag owns the words up to the next flag, so reading needs no knowledge of the flags. Hyphens
    and underscores are the same.

    Returns:
        The settings by option name, and the words before the first flag.

    Raises:
        UserError: If a word looks like a flag but is none, such as ``-x``.
    """
    settings: dict[str, Setting] = {}
    leading, groups = _flag_groups(words)
    for flag, values in groups:
        name = flag.removeprefix("--").replace("-", "_")
        given = Words(tuple(values))
        before = settings.get(name)
        if before is not None and isinstance(before.value, Words):
            if name in REPEATABLE:
                given = Words((*before.value.words, *given.words))
            else:
                notices.append(f"{flag} is given twice; '{given}' wins over '{before.value}'")
        settings[name] = Setting(value=given, place=flag, origin="command line")
    return settings, [
        Setting(value=Words((word,)), place=repr(word), origin="command line") for word in leading
    ]


def _flag_groups(words: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    leading: list[str] = []
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
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
    if path.suffix != ".toml":
        path = path.with_name(f"{path.name}.toml")
    document, lines = read_toml(path)
    settings: dict[str, Setting] = {}
    problems: list[Problem] = []
    for keys, value in _leaves(document):
        name = str(keys[-1]).replace("-", "_")
        line = lines.get(keys)
        where = f"{path}:{line}" if line else str(path)
        dotted = ".".join(str(key) for key in keys)
        if name in settings:
            problems.append(
                Problem(
                    place=f"{where} {dotted}",
                    message=f"stands twice, before at {settings[name].place}",
                    remedy="remove one of them",
                )
            )
            continue
        settings[name] = Setting(value=value, place=f"{where} {dotted}", origin=where)
    if problems:
        raise UserError(problems)
    return settings


def _leaves(table: Mapping[str, Any], above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    for key, value in table.items():
        is_group = isinstance(value, dict) and key.replace("-", "_") not in _TABLES
        if is_group:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def from_mapping(options: Mapping[str, Any]) -> dict[str, Setting]:
    """Take options from Python; paths may be ``Path`` objects."""
    return {
        name: Setting(
            value=str(value) if isinstance(value, Path) else value,
            place=f"option {name}",
            origin="python",
        )
        for name, value in options.items()
    }


def merge(command_line: dict[str, Setting]) -> dict[str, Setting]:
    """Put the settings of ``--config_file``, if one is named, below those of the command line.

    Raises:
        UserError: As :func:`from_file`.
    """
    named = command_line.get("config_file")
    if named is None or "output_config" in command_line:
        return command_line
    value = named.value
    text = value.words[0] if isinstance(value, Words) and value.words else str(value)
    settings = from_file(Path(text).expanduser())
    if "plugins" in settings:
        # The key of a list reads better in the plural.
        settings.setdefault("plugin", settings.pop("plugins"))
    return {**settings, **_with_plugins_of_both(settings, command_line)}


def _with_plugins_of_both(
    file: Mapping[str, Setting], command_line: Mapping[str, Setting]
) -> dict[str, Setting]:
    """A plugin named on the command line joins those of the file; it does not replace them."""
    merged = dict(command_line)
    for name in REPEATABLE:
        if name in file and name in merged and isinstance(merged[name].value, Words):
            listed = file[name].value
            before = [str(item) for item in listed] if isinstance(listed, list) else [str(listed)]
            given = merged[name]
            words = Words((*before, *given.value.words))  # type: ignore[attr-defined]
            merged[name] = Setting(value=words, place=given.place, origin=given.origin)
    return merged
