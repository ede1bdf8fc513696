"""JSON that people wrote: mistakes with their line, no key twice."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sdxl_train.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


def parse_json(text: str, path: Path, *, line: int = 1) -> Any:
    """Parse JSON text.

    Args:
        text: The text.
        path: The file it is from, for messages.
        line: The line of the file on which it begins.

    Raises:
        UserError: With file, line and column of the mistake.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}:{error.colno}"
        raise UserError.of(place, f"is no JSON: {error.msg}", "correct this line") from None
    except RecursionError:
        raise UserError.of(f"{path}:{line}", "is nested too deeply", "write it flat") from None
    except _DuplicateKeyError as error:
        key = error.args[0]
        place = f"{path}:{line + (line_of_key(text, key, last=True) or 1) - 1}"
        raise UserError.of(place, f"key {key} occurs twice", "remove one") from None


def line_of_key(text: str, key: str, *, last: bool = False) -> int | None:
    """Give the line of a key in JSON text, counted from 1, by a search for its letters."""
    find = text.rfind if last else text.find
    for ensure_ascii in (False, True):
        at = find(json.dumps(key, ensure_ascii=ensure_ascii))
        if at >= 0:
            return text.count("\n", 0, at) + 1
    return None


class _DuplicateKeyError(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for key in keys if keys.count(key) > 1))
    return table
