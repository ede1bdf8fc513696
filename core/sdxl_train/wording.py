"""Words for what a value may be, made of its JSON schema; and for names that were mistyped."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_BOUNDS = (
    ("minimum", ">="),
    ("exclusiveMinimum", ">"),
    ("maximum", "<="),
    ("exclusiveMaximum", "<"),
)
_BEYOND_REACH = 2**31
_WORDS = {
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "boolean": ("true or false", "values true or false"),
    "string": ("text", "texts"),
    "object": ("a table", "tables"),
}
_PLACEHOLDERS = {"integer": "N", "number": "X", "boolean": "true|false", "string": "TEXT"}


def branches(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Give the alternatives that a JSON schema allows, other than null."""
    if "anyOf" in schema:
        for branch in schema["anyOf"]:
            yield from branches(branch)
    elif schema.get("type") != "null":
        yield schema


def choices(schema: Mapping[str, Any]) -> list[str]:
    """Give the fixed values that a JSON schema allows."""
    listed: list[str] = []
    for branch in branches(schema):
        fixed = [branch["const"]] if "const" in branch else branch.get("enum", [])
        listed += [str(value) for value in fixed]
    return listed


def describe(schema: Mapping[str, Any]) -> str:
    """Put a JSON schema of one value into words: ``a number >= 0``."""
    return " or ".join(dict.fromkeys(_describe(branch) for branch in branches(schema)))


def bounds(schema: Mapping[str, Any]) -> str:
    """Give the range of a number: ``>= 0 and < 1``; empty where there is none."""
    ranges = dict.fromkeys(_range(branch) for branch in branches(schema))
    return " or ".join(text for text in ranges if text)


def placeholder(schema: Mapping[str, Any]) -> str:
    """Give what stands for the value in a line of help: ``N``, ``X,X``, ``no|fp16|bf16``."""
    shapes = dict.fromkeys(_placeholder(branch) for branch in branches(schema))
    if "KEY=VALUE ..." in shapes:
        return "KEY=VALUE ..."
    return "|".join(shapes)


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Give the candidate that ``name`` was probably meant to be."""
    by_plain = {_plain(candidate): candidate for candidate in candidates}
    found = difflib.get_close_matches(_plain(name), by_plain, n=1, cutoff=0.6)
    return by_plain[found[0]] if found else None


def suggestion(name: str, candidates: Sequence[str]) -> str:
    """Give the remedy for an unknown name: the nearest one, or all of them if they are few."""
    near = nearest(name, candidates)
    if near:
        return f"did you mean {near}?"
    if candidates and len(candidates) <= 12:
        return f"known are {', '.join(sorted(candidates))}"
    return ""


def visible(text: str) -> str:
    """Show as escapes what could steer a terminal or reverse its text; lines and tabs stay."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_one_line(text: str) -> str:
    """Show line ends and tabs as escapes too: names of files may have them."""
    return visible(text).replace("\n", r"\n").replace("\t", r"\t")


_STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
"""Control characters, and those that change the direction of writing (Unicode TR 9)."""


def _plain(name: str) -> str:
    return name.replace("-", "_").lower()


def _describe(branch: Mapping[str, Any]) -> str:
    listed = choices(branch)
    if listed:
        return f"one of {', '.join(listed)}" if len(listed) > 1 else listed[0]
    kind = str(branch.get("type"))
    if kind == "array":
        if "prefixItems" in branch:
            return f"{len(branch['prefixItems'])} {_plural(branch['prefixItems'][0])}"
        return f"a list of {_plural(branch.get('items', {}))}"
    if branch.get("format") == "path":
        return "a path"
    return f"{_WORDS.get(kind, ('a value',))[0]} {_range(branch)}".strip()


def _range(branch: Mapping[str, Any]) -> str:
    return " and ".join(
        f"{sign} {branch[key]:g}"
        for key, sign in _BOUNDS
        # What no one would reach needs no mention.
        if key in branch and abs(branch[key]) < _BEYOND_REACH
    )


def _plural(schema: Mapping[str, Any]) -> str:
    words = _WORDS.get(str(schema.get("type")), ("a value", "values"))[1]
    return f"{words} {_range(schema)}".strip()


def _placeholder(branch: Mapping[str, Any]) -> str:
    listed = choices(branch)
    if listed:
        return "|".join(listed)
    kind = str(branch.get("type"))
    if kind == "object":
        return "KEY=VALUE ..."
    if kind == "array":
        if "prefixItems" in branch:
            return ",".join(_placeholder(item) for item in branch["prefixItems"])
        return f"{placeholder(branch.get('items', {}))} ..."
    if branch.get("format") == "path":
        return "PATH"
    return _PLACEHOLDERS.get(kind, "VALUE")
