"""Values that are given one for each of some named things: in order, or by name.

``8,8,16`` or ``input_4=8,middle=16,output_*=4``: a name, or a glob that fits several.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def read_values(value: object, *, whole: bool) -> object:
    """Read numbers in order, or by name, for a validator of pydantic.

    Args:
        value: What was given: text, a list, or a table from names to numbers. Anything else is
            given back as it is.
        whole: Whether numbers must be whole.

    Returns:
        A list of numbers >= 0, None for those that were; or a table from what was given for names,
        globs among them, to such numbers.

    Raises:
        ValueError: If something is no such number.
    """
    if isinstance(value, str):
        value = [item for item in value.split(",") if item.strip()]
    if isinstance(value, list) and any("=" in str(item) for item in value):
        pairs = [str(item).partition("=") for item in value]
        unnamed = [name for name, equals, _ in pairs if not equals]
        if unnamed:
            raise ValueError(f"'{unnamed[0]}' has no NAME= before it, as the others have")
        value = {name: number for name, _, number in pairs}
    if isinstance(value, list):
        return [None if item is None else _number(item, whole=whole) for item in value]
    if isinstance(value, dict):
        return {str(name).strip(): _number(item, whole=whole) for name, item in value.items()}
    return value


def named_values(
    values: Sequence[float | None] | Mapping[str, float],
    names: Sequence[str],
    *,
    groups: Sequence[str] = (),
    spelling: Callable[[str], str] = str.lower,
) -> dict[str, float | None]:
    """Give each name its value, of those that :func:`read_values` read.

    Args:
        values: They.
        names: The names, in order.
        groups: Words that mean every name that begins with them.
        spelling: Turns what was given into the spelling of ``names``.

    Returns:
        The value of each name, None where nothing was said; where several fit, the last counts.

    Raises:
        ValueError: If they are not as many as the names, or there is no such name; with the names
            that are close.
    """
    if not isinstance(values, Mapping):
        if len(values) != len(names):
            raise ValueError(
                f"{len(values)} values, expected {len(names)}, one for each of {', '.join(names)}"
            )
        return dict(zip(names, values, strict=True))
    found: dict[str, float | None] = dict.fromkeys(names)
    for name, number in values.items():
        for index in _positions(spelling(name), names, groups):
            found[names[index]] = number
    return found


def _number(item: object, *, whole: bool) -> float:
    try:
        number = float(str(item))
    except ValueError:
        raise ValueError(f"'{item}' is not a number") from None
    if not 0 <= number < math.inf or (whole and not number.is_integer()):
        raise ValueError(f"{item} is not a {'whole ' if whole else ''}number >= 0")
    return int(number) if whole else number


def _positions(pattern: str, names: Sequence[str], groups: Sequence[str]) -> list[int]:
    found = [
        index
        for index, name in enumerate(names)
        if fnmatchcase(name, pattern) or (pattern in groups and name.startswith(pattern))
    ]
    if not found:
        near = difflib.get_close_matches(pattern, [*names, *groups], n=5, cutoff=0.4)
        raise ValueError(
            f"there is no '{pattern}'; {'close are' if near else 'they are'} "
            f"{', '.join(near or names)}"
        )
    return found
