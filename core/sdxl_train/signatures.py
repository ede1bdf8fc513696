"""Options made of a constructor's signature: names, types, defaults and, where it has them, words.

Only what a command line can write becomes an option: numbers, switches, texts, and tuples and lists
of them. An argument of another type is left at its default.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

from pydantic import BeforeValidator, Field, WithJsonSchema

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator


def _as_python(value: object) -> object:
    """Read a word as Python does, as sd-scripts reads every ``key=value``."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


_Number: TypeAlias = Annotated[int | float, WithJsonSchema({"type": "number"})]
"""An argument without a type may say 0 and mean 0.1 too."""
_Untyped: TypeAlias = Annotated[
    bool | int | float | str | tuple[int | float, ...] | None,
    BeforeValidator(_as_python),
    WithJsonSchema({}),
]
_PLAIN = (bool, int, float, str)


def arguments_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Give the named arguments of a function, or of a class's constructor."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(target).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}


def fields_of(
    target: Callable[..., Any], *, without: Collection[str], filled: Collection[str] = ()
) -> dict[str, Any]:
    """Give the fields of an option model for the arguments of a function or constructor.

    Args:
        target: The function or class.
        without: Arguments that are no options.
        filled: Arguments that need not be given, whatever the signature says.

    Returns:
        Type and field by name, as ``pydantic.create_model`` takes them.

    Raises:
        TypeError: If an argument that must be given cannot be written as an option.
    """
    hints = _hints(target)
    words = dict(_described(target))
    fields: dict[str, Any] = {}
    for name, parameter in arguments_of(target).items():
        if name in without or name.startswith("_"):
            continue
        default = parameter.default
        required = default is parameter.empty and name not in filled
        if default is parameter.empty:
            default = ... if required else None
        elif isinstance(default, float) and not math.isfinite(default):
            # JSON has no infinity; what is None is left to the library.
            default = None
        kind = _written(hints.get(name, parameter.empty), parameter.default)
        if kind is not None:
            kind = kind if default is not None else kind | None
            fields[name] = (kind, Field(default, description=words.get(name, "")))
        elif required:
            raise TypeError(f"its argument '{name}' cannot be written as an option")
    return fields


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        # Names that the library imports for type checkers only; the defaults have types too.
        return {}


def _written(annotation: Any, default: object) -> Any:
    """Give the type in which a value is written; None if it cannot be."""
    if annotation in (inspect.Parameter.empty, Any):
        return _of_default(default)
    if annotation in _PLAIN or annotation is types.NoneType:
        return annotation
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return annotation if all(isinstance(value, _PLAIN) for value in inner) else None
    if origin in (Union, types.UnionType):
        members = [kind for kind in (_written(arg, None) for arg in inner) if kind is not None]
        plain = [kind for kind in members if kind is not types.NoneType]
        return Union[tuple(members)] if plain else None  # noqa: UP007
    if origin is tuple:
        return _tuple([arg if arg is ... else _written(arg, None) for arg in inner])
    if isinstance(origin, type) and issubclass(origin, Iterable) and issubclass(list, origin):
        item = _written(inner[0], None) if len(inner) == 1 else None
        return list[item] if item else None  # type: ignore[valid-type]
    return None


def _of_default(default: object) -> Any:
    if isinstance(default, (bool, str)):
        return type(default)
    if isinstance(default, (int, float)):
        return _Number
    if isinstance(default, (tuple, list)) and default:
        return _tuple([_of_default(value) for value in default])
    return _Untyped if default in (None, inspect.Parameter.empty) else None


def _tuple(items: Sequence[Any]) -> Any:
    return None if None in items else tuple.__class_getitem__(tuple(items))


def _described(target: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    """Give what a docstring says of each argument, in the ways of Google and of Sphinx."""
    text = inspect.getdoc(target) or ""
    for match in re.finditer(
        r"^\s*(?::param )?(\w+)(?: \([^\n]*?\))?: ((?:\S.*)(?:\n\s{8,}\S.*)*)", text, re.MULTILINE
    ):
        yield match[1], " ".join(match[2].split())
