"""Read TOML files that people wrote, and say where each key stands."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeAlias

import tomli

from sdxl_train.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

KeyPath: TypeAlias = "tuple[str | int, ...]"
"""Keys and list positions from the root: ``("datasets", 0, "resolution")``."""

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*[A-Za-z0-9_-]+)*)\s*=""")


def read_toml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """Read a TOML file.

    Returns:
        The document, and the line number of every key and table header.

    Raises:
        UserError: If the file cannot be read, decoded or parsed; with line and column.
    """
    text = read_text(path)
    try:
        return tomli.loads(text), _lines(text)
    except RecursionError:
        raise UserError.of(str(path), "is nested too deeply", "write it flat") from None
    except tomli.TOMLDecodeError as error:
        # The fault may lie behind the last line.
        line = next(iter(text.split("\n")[error.lineno - 1 :]), "")
        raise UserError.of(
            f"{path}:{error.lineno}:{error.colno}",
            f"{error.msg}: {line.strip()}" if line else error.msg,
            _syntax_remedy(line),
        ) from None


def read_text(path: Path) -> str:
    """Read a text file that a person wrote, with plain line ends.

    Raises:
        UserError: If it cannot be read, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError.of(
            str(path), f"cannot be read: {error.strerror}", "check the path"
        ) from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError.of(str(path), "is encoded as UTF-16", "save it as UTF-8")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError.of(
            f"{path}:{line}", f"byte 0x{data[error.start]:02x} is not UTF-8", "save it as UTF-8"
        ) from None


def _syntax_remedy(line: str) -> str:
    if "\\" in line and '"' in line:
        return "a backslash in \"...\" is an escape: write the path in 'single quotes' or with /"
    if re.search(r"=\s*(True|False)\b", line):
        return "TOML writes true and false in lower case"
    if re.match(r"\s*[\w-]+\s*=\s*[A-Za-z~./]", line):
        return "text needs quotes"
    return "correct this line"


def _lines(text: str) -> dict[KeyPath, int]:
    """Locate keys by a scan of the lines; keys inside multi-line values may be missed."""
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    counts: dict[KeyPath, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        header = _HEADER.match(line)
        if header:
            table = _table_path(_parts(header[2]), counts, is_array=header[1] == "[[")
            lines.setdefault(table, number)
        elif (key := _KEY.match(line)) is not None:
            lines.setdefault((*table, *_parts(key[1])), number)
    return lines


def _table_path(names: list[str], counts: dict[KeyPath, int], *, is_array: bool) -> KeyPath:
    path: KeyPath = ()
    for position, name in enumerate(names):
        path = (*path, name)
        if is_array and position == len(names) - 1:
            counts[path] = counts.get(path, -1) + 1
        if path in counts:
            path = (*path, counts[path])
    return path


def _parts(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]
