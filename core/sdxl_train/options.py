"""Option models turned into flags, TOML keys, checks, help and schema.

The one declaration of an option is a field of an :class:`~sdxl_train.components.OptionModel`.
Everything a user sees of it is derived here. A rule that makes a value of what is written, such as
``10%``, belongs into the field's type (``Annotated`` with a validator): validators of the model see
finished values only.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from sdxl_train.components import KINDS, OptionModel
from sdxl_train.errors import Problem
from sdxl_train.files import expanded
from sdxl_train.wording import branches, choices, describe, nearest, suggestion

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic.fields import FieldInfo

__all__ = [
    "Option",
    "Setting",
    "Words",
    "nearest",
    "options_of",
    "parse_pairs",
    "suggestion",
    "validate",
]


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
        keys: Of a table, each value as a setting of its own.
    """

    value: object
    place: str
    origin: str
    keys: Mapping[str, Setting] = field(default_factory=dict)


class _ValueType:
    """What the values of one annotation are checked and described by."""

    def __init__(self, annotation: Any) -> None:
        self.adapter: TypeAdapter[Any] = TypeAdapter(
            annotation, config=ConfigDict(allow_inf_nan=False)
        )

    @cached_property
    def schema(self) -> Mapping[str, Any]:
        return self.adapter.json_schema(mode="serialization")

    @cached_property
    def input_schema(self) -> Mapping[str, Any]:
        return self.adapter.json_schema(mode="validation")


def _value_type(annotation: Any) -> _ValueType:
    """Give the type of an annotation; hundreds of options share some dozens, and help needs all."""
    try:
        hash(annotation)
    except TypeError:
        return _ValueType(annotation)
    # Equal are also int | str and str | int, which read differently.
    return _shared_type(annotation, repr(annotation))


@cache
def _shared_type(annotation: Any, _words: str) -> _ValueType:
    return _ValueType(annotation)


@dataclass(frozen=True)
class Option:
    """One option: a field of an option model."""

    name: str
    owner: type[OptionModel]

    @property
    def field(self) -> FieldInfo:
        """The pydantic field behind it."""
        return self.owner.model_fields[self.name]

    @cached_property
    def args(self) -> str | None:
        """The option whose ``key=value`` words it is one of; None for a flag of its own.

        A component declares a flag with ``Field(..., json_schema_extra={"flag": True})``.
        """
        extra = self.field.json_schema_extra
        if isinstance(extra, dict) and extra.get("flag"):
            return None
        for kind in KINDS:
            if kind.args and issubclass(self.owner, kind.base):
                return None if self.name in kind.base.model_fields else kind.args
        return None

    @property
    def flag(self) -> str:
        """How it is given: ``--seed``, ``--network_args conv_dim``."""
        return f"--{self.args} {self.name}" if self.args else f"--{self.name}"

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
        value = self.field.get_default(call_default_factory=True, validated_data={})
        return None if value is PydanticUndefined else value

    @cached_property
    def _type(self) -> _ValueType:
        return _value_type(self.field.rebuild_annotation())

    @property
    def _adapter(self) -> TypeAdapter[Any]:
        return self._type.adapter

    @property
    def schema(self) -> Mapping[str, Any]:
        """JSON schema of its value."""
        return self._type.schema

    @property
    def input_schema(self) -> Mapping[str, Any]:
        """JSON schema of what may be written for it in a file: more forms than the value has."""
        return self._type.input_schema

    @cached_property
    def is_switch(self) -> bool:
        """Whether the flag stands alone: ``--sdpa``."""
        return any(branch.get("type") == "boolean" for branch in branches(self.schema))

    @cached_property
    def is_list(self) -> bool:
        """Whether the flag takes several words."""
        return any(branch.get("type") == "array" for branch in branches(self.schema))

    @cached_property
    def is_nullable(self) -> bool:
        """Whether it may be unset."""
        return {"type": "null"} in self.schema.get("anyOf", ())

    @cached_property
    def is_secret(self) -> bool:
        """Whether its value is to be seen nowhere: a password, a key."""
        return any(branch.get("writeOnly") for branch in branches(self.schema))

    @property
    def expected(self) -> str:
        """What a value must be, in words: ``a number >= 0``."""
        return describe(self.schema)

    def parse(self, value: object) -> Any:
        """Turn a given value into the option's own type.

        Words of the command line are read leniently (``1e-4`` is text there by nature), values of
        TOML strictly: ``"1e-4"`` in quotes is not a number. In paths, ``~`` and environment
        variables are put in.

        Raises:
            ValueError: With what was expected, if the value does not fit.
        """
        try:
            if isinstance(value, Words):
                parsed = self._parse_words(value.words)
            else:
                parsed = self._parse_value(value)
        except ValidationError as error:
            raise ValueError(self._complaint(value, error)) from None
        if isinstance(parsed, Path):
            return self._expanded(parsed, value)
        return parsed

    def _parse_words(self, words: tuple[str, ...]) -> Any:
        if self.is_switch and not words:
            return True
        if self.is_list:
            return self._parse_list(words)
        if len(words) != 1:
            shown = "" if self.is_secret else f" ({' '.join(words)})"
            count = f"got {len(words)} values{shown}" if words else "got no value"
            raise ValueError(f"{count}, expected {self.expected}")
        return self._parse_word(words[0])

    def _parse_word(self, word: str) -> Any:
        if word == "None" and self.is_nullable:
            return None
        try:
            return self._adapter.validate_python(word)
        except ValidationError:
            literal = _literal(word)
            # To Python True is the number 1; to the user it is a mistake.
            if literal is _NO_LITERAL or isinstance(literal, bool):
                raise
            return self._adapter.validate_python(literal)

    def _parse_list(self, words: tuple[str, ...]) -> Any:
        literal = _literal(words[0]) if len(words) == 1 else None
        if isinstance(literal, (list, tuple)):
            with contextlib.suppress(ValidationError):
                return self._adapter.validate_python(literal)
        if self._takes_numbers:
            words = tuple(item for word in words for item in word.split(",") if item.strip())
        return self._adapter.validate_python(list(words))

    @cached_property
    def _takes_numbers(self) -> bool:
        array = next(branch for branch in branches(self.schema) if branch.get("type") == "array")
        items = [*array.get("prefixItems", ()), array.get("items", {})]
        return any(item.get("type") in ("integer", "number") for item in items)

    def _parse_value(self, value: object) -> Any:
        try:
            return self._validate_strictly(value)
        except ValidationError:
            # A list of one may be written without brackets, as on the command line.
            if not self.is_list or isinstance(value, (list, tuple, dict)):
                raise
            return self._validate_strictly([value])

    def _validate_strictly(self, value: object) -> Any:
        return self._adapter.validate_json(json.dumps(value, default=str), strict=True)

    def _expanded(self, path: Path, given: object) -> Path | None:
        if str(given) == "":
            if self.is_nullable:
                return None
            raise ValueError("is empty, expected a path")
        full = expanded(path)
        unset = _VARIABLE.search(str(full))
        if unset and not full.exists():
            raise ValueError(f"'{path}' names the variable {unset[0]}, which is not set")
        return full

    def _complaint(self, value: object, error: ValidationError) -> str:
        if self.is_secret:
            return f"the value is not {self.expected}"
        for detail in error.errors():
            if detail["type"] == "value_error":
                return str(detail["ctx"]["error"])
        if isinstance(value, Words):
            shown = f"'{value}'" if value.words else "nothing"
        else:
            shown = json.dumps(value, default=str, ensure_ascii=False)
        text = f"{shown} is not {self.expected}"
        near = nearest(str(value), choices(self.schema))
        if near:
            return f"{text}; did you mean {near}?"
        return f"{text}; write it without quotes" if self._fits_unquoted(value) else text

    def _fits_unquoted(self, value: object) -> bool:
        if not isinstance(value, str):
            return False
        try:
            self._parse_words((value,))
        except ValueError:
            return False
        return True


@cache
def options_of(model: type[OptionModel]) -> dict[str, Option]:
    """Give the options of a model by name, in order of declaration.

    An option that a model inherits is that of its base, so that its schema is made once.
    """
    return {name: _option(name, model) for name in model.model_fields}


def _option(name: str, model: type[OptionModel]) -> Option:
    # A field declared in the same words as that of a base is that of the base, or as good as it.
    words = _declaration(model.model_fields[name])
    for base in model.__bases__:
        inherited = getattr(base, "model_fields", {}).get(name)
        if inherited is not None and _declaration(inherited) == words:
            return options_of(base)[name]
    return Option(name, model)


def _declaration(field: FieldInfo) -> tuple[object, ...]:
    return (
        field.annotation,
        field.metadata,
        field.default,
        field.default_factory,
        field.description,
        field.json_schema_extra,
    )


def validate(
    model: type[OptionModel], settings: Mapping[str, Setting], problems: list[Problem]
) -> OptionModel | None:
    """Build an option model from the settings of its fields, adding every mistake to ``problems``.

    A mistaken value counts as not given, so that later checks can go on and report what else is
    wrong. None means that the model cannot be built: a required option is missing, or the options
    contradict one another.
    """
    values: dict[str, Any] = {}
    is_complete = True
    for name, option in options_of(model).items():
        try:
            if name in settings:
                values[name] = option.parse(settings[name].value)
            elif option.required:
                is_complete = False
                message = f"is required: {option.help}"
                problems.append(Problem(place=option.flag, message=message))
        except ValueError as error:
            is_complete = is_complete and not option.required
            problems.append(Problem(place=settings[name].place, message=str(error)))
    if not is_complete:
        return None
    try:
        return model(**values)
    except ValidationError as error:
        for detail in error.errors():
            problems.append(
                Problem(
                    place=_place_of(detail["loc"], model, settings),
                    message=str(detail.get("ctx", {}).get("error", detail["msg"])),
                )
            )
        return None


def _place_of(
    location: tuple[int | str, ...], model: type[OptionModel], settings: Mapping[str, Setting]
) -> str:
    """Give the place of a field, or where the model as a whole is wrong, of all that was given."""
    known = options_of(model)
    if location and str(location[0]) in known:
        name = str(location[0])
        return settings[name].place if name in settings else known[name].flag
    return ", ".join(settings[name].place for name in known if name in settings)


def parse_pairs(
    words: Iterable[str], place: str, origin: str, problems: list[Problem]
) -> dict[str, Setting]:
    """Read ``key=value`` words, as ``--network_args`` takes them.

    A value may hold ``=`` and commas, and may be quoted; keys are case-sensitive as in sd-scripts.
    """
    settings: dict[str, Setting] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            message, remedy = f"{word!r} is not key=value", "write for example conv_dim=8"
            problems.append(Problem(place=place, message=message, remedy=remedy))
        elif key in settings:
            problems.append(
                Problem(place=f"{place} {key}", message="stands twice", remedy="remove one of them")
            )
        else:
            settings[key] = Setting(
                value=Words((_unquoted(value.strip()),)), place=f"{place} {key}", origin=origin
            )
    return settings


_NO_LITERAL = object()
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
"""A variable of the environment that is left in a path: it has no value."""


def _literal(word: str) -> object:
    """Read Python's notation, which sd-scripts users write: ``1e3``, ``(0.9, 0.999)``."""
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return _NO_LITERAL


def _unquoted(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text
