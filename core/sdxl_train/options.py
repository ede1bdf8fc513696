"""Option models turned into flags, TOML keys, checks, help and schema.

The one declaration of an option is a field of an :class:`~sdxl_train.components.OptionModel`.
Everything a user sees of it is derived here.
"""

from __future__ import annotations

import ast
import difflib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pydantic.fields import FieldInfo

    from sdxl_train.components import OptionModel


@dataclass(frozen=True)
class Words:
    """A value as typed on the command line: the words after the flag, unparsed."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        """Give the words as typed."""
        return " ".join(self.words)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value that the user gave, and where.

    Attributes:
        value: :class:`Words` from the command line, or a value of TOML or Python.
        place: Where it was given, as a message names it: ``--seed``, ``run.toml:3 seed``.
        origin: The same for the record: ``command line``, ``run.toml:3``.
    """

    value: object
    place: str
    origin: str


@dataclass(frozen=True)
class Option:
    """One option: a field of an option model."""

    name: str
    owner: type[OptionModel]

    @property
    def field(self) -> FieldInfo:
        """The pydantic field behind it."""
        return self.owner.model_fields[self.name]

    @property
    def flag(self) -> str:
        """The flag as typed."""
        return f"--{self.name}"

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.field.is_required()

    @property
    def help(self) -> str:
        """Its description."""
        return self.field.description or ""

    @property
    def default(self) -> Any:
        """Its default, or None where it is required."""
        value = self.field.get_default(call_default_factory=True)
        return None if value is PydanticUndefined else value

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.field.rebuild_annotation(), config=ConfigDict(allow_inf_nan=False))

    @cached_property
    def schema(self) -> dict[str, Any]:
        """JSON schema of its value."""
        return self._adapter.json_schema()

    @property
    def is_switch(self) -> bool:
        """Whether the flag stands alone: ``--sdpa``."""
        return any(branch.get("type") == "boolean" for branch in _branches(self.schema))

    @property
    def is_list(self) -> bool:
        """Whether the flag takes several words."""
        return any(branch.get("type") == "array" for branch in _branches(self.schema))

    @property
    def expected(self) -> str:
        """What a value must be, in words: ``a number >= 0``."""
        return describe(self.schema)

    def parse(self, value: object) -> Any:
        """Turn a given value into the option's own type.

        Words of the command line are read leniently (``1e-4`` is text there by nature), values of
        TOML strictly: ``"1e-4"`` in quotes is not a number.

        Raises:
            ValueError: With what was expected, if the value does not fit.
        """
        try:
            if isinstance(value, Words):
                return self._parse_words(value.words)
            return self._adapter.validate_json(json.dumps(value, default=str), strict=True)
        except ValidationError as error:
            raise ValueError(self._complaint(value, error)) from None

    def _parse_words(self, words: tuple[str, ...]) -> Any:
        if self.is_list and not (len(words) == 1 and _is_literal_list(words[0])):
            return self._adapter.validate_python(self._items(words))
        if not words and self.is_switch:
            return True
        if len(words) != 1:
            count = "no value" if not words else f"{len(words)} values"
            raise ValueError(f"got {count} ({' '.join(words)}), expected {self.expected}")
        (word,) = words
        try:
            return self._adapter.validate_python(word)
        except ValidationError:
            literal = _literal(word)
            if literal is _NO_LITERAL:
                raise
            return self._adapter.validate_python(literal)

    def _items(self, words: tuple[str, ...]) -> list[str]:
        items = next(b for b in _branches(self.schema) if b.get("type") == "array").get("items", {})
        if items.get("type") in ("number", "integer"):
            return [item for word in words for item in word.split(",") if item.strip()]
        return list(words)

    def _complaint(self, value: object, error: ValidationError) -> str:
        for detail in error.errors():
            if detail["type"] == "value_error":
                return str(detail["ctx"]["error"])
        shown = f"'{value}'" if isinstance(value, Words) else repr(value)
        text = f"{shown} is not {self.expected}"
        choices = [str(choice) for branch in _branches(self.schema) for choice in _choices(branch)]
        near = nearest(str(value), choices)
        return f"{text}; did you mean {near}?" if near else text


def options_of(
    model: type[OptionModel], *, inherited_from: type[OptionModel] | None = None
) -> dict[str, Option]:
    """Give the options of a model by name, in order of declaration.

    With ``inherited_from``, only those that the model declares itself.
    """
    inherited = set(inherited_from.model_fields) if inherited_from else set()
    return {name: Option(name, model) for name in model.model_fields if name not in inherited}


def validate(
    model: type[OptionModel], settings: Mapping[str, Setting], problems: list[Problem]
) -> OptionModel | None:
    """Build an option model from the settings of its fields, adding every mistake to ``problems``.

    A mistaken value counts as not given, so that later checks can go on and report what else is
    wrong. None means that the model cannot be built: a required option is missing, or the options
    contradict one another.
    """
    values: dict[str, Any] = {}
    complete = True
    for name, option in options_of(model).items():
        if name in settings:
            try:
                values[name] = option.parse(settings[name].value)
                continue
            except ValueError as error:
                problems.append(Problem(place=settings[name].place, message=str(error)))
                complete = complete and not option.required
                continue
        if option.required:
            complete = False
            problems.append(
                Problem(place=option.flag, message=f"is required: {option.help}", remedy="set it")
            )
    if not complete:
        return None
    try:
        return model(**values)
    except ValidationError as error:
        for detail in error.errors():
            where = [settings[str(part)].place for part in detail["loc"] if str(part) in settings]
            place = where[0] if where else ", ".join(f"--{name}" for name in values)
            message = str(detail.get("ctx", {}).get("error", detail["msg"]))
            problems.append(Problem(place=place, message=message))
        return None


def parse_pairs(
    words: Iterable[str], place: str, origin: str, problems: list[Problem]
) -> dict[str, Setting]:
    """Read ``key=value`` words, as ``--network_args`` takes them.

    A value may hold ``=`` and commas; keys are case-sensitive as in sd-scripts.
    """
    settings: dict[str, Setting] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            problems.append(
                Problem(
                    place=place,
                    message=f"{word!r} is not key=value",
                    remedy="write for example conv_dim=8",
                )
            )
            continue
        settings[key] = Setting(
            value=Words((_unquote(value.strip()),)), place=f"{place} {key}", origin=origin
        )
    return settings


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Give the candidate that ``name`` was probably meant to be."""
    by_plain = {candidate.replace("-", "_").lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(name.replace("-", "_").lower(), by_plain, n=1, cutoff=0.6)
    return by_plain[found[0]] if found else None


def suggestion(name: str, candidates: Sequence[str]) -> str:
    """Give the remedy for an unknown name: the nearest one, or all of them if they are few."""
    near = nearest(name, candidates)
    if near:
        return f"did you mean {near}?"
    if candidates and len(candidates) <= 12:
        return f"known are {', '.join(sorted(candidates))}"
    return ""


def describe(schema: Mapping[str, Any]) -> str:
    """Put a JSON schema of one value into words."""
    return " or ".join(dict.fromkeys(_describe_branch(branch) for branch in _branches(schema)))


_TYPE_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "object": "a table",
}
_BOUNDS = (
    ("minimum", ">="),
    ("exclusiveMinimum", ">"),
    ("maximum", "<="),
    ("exclusiveMaximum", "<"),
)


def _describe_branch(branch: Mapping[str, Any]) -> str:
    choices = _choices(branch)
    if choices:
        listed = ", ".join(str(choice) for choice in choices)
        return f"one of {listed}" if len(choices) > 1 else listed
    kind = branch.get("type")
    if kind == "array":
        if "prefixItems" in branch:
            return f"{len(branch['prefixItems'])} values"
        items = describe(branch.get("items", {}))
        return f"a list of {items.removeprefix('a ')}" if items else "a list"
    if branch.get("format") == "path":
        return "a path"
    bounds = " and ".join(f"{sign} {branch[key]:g}" for key, sign in _BOUNDS if key in branch)
    return f"{_TYPE_WORDS.get(str(kind), 'a value')} {bounds}".strip()


def _branches(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "anyOf" in schema:
        for branch in schema["anyOf"]:
            yield from _branches(branch)
    elif schema.get("type") != "null":
        yield schema


def _choices(branch: Mapping[str, Any]) -> list[Any]:
    if "const" in branch:
        return [branch["const"]]
    return list(branch.get("enum", []))


_NO_LITERAL = object()


def _literal(word: str) -> object:
    """Read Python's notation, which sd-scripts users write: ``None``, ``(0.9, 0.999)``."""
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return _NO_LITERAL


def _is_literal_list(word: str) -> bool:
    return word[:1] in ("[", "(")


def _unquote(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text
