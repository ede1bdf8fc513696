"""JSON schemas of the files that a user writes, for editors: options and datasets.

They come from the same declarations as the flags and checks, and hold the options of every plugin
that is installed, for a file may name any of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from sdxl_train.components import KINDS, Kind
from sdxl_train.config import CORE_OPTIONS, HostOptions
from sdxl_train.data.dataset_file import CALLED_HERE, DatasetFile
from sdxl_train.data.dataset_options import DatasetOptions
from sdxl_train.options import Option, options_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sdxl_train.registry import Entry, Registry

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_COMMAND_LINE_ONLY = ("config_file", "output_config")

JsonSchema: TypeAlias = dict[str, Any]


def run_schema(registry: Registry) -> JsonSchema:
    """Give the schema of a file for ``--config_file``.

    A table only groups the options in it, whatever its name; so an unknown key that is no table is
    a mistake.
    """
    entries = [*registry.all_entries(), *registry.installed_entries()]
    entries = [entry for entry in entries if entry.kind.selector]
    properties = _of_core() | _of_components(entries)
    for kind in KINDS:
        names = [entry.name for entry in entries if entry.kind is kind]
        if kind.selector:
            properties[kind.selector] |= _selector(kind, names)
        if kind.args:
            properties[kind.args] |= _args(kind, entries)
    properties["plugins"] = properties["plugin"]
    return {
        "$schema": _DRAFT,
        "title": "Options of sdxl-train",
        "type": "object",
        "properties": dict(sorted(properties.items())),
        "additionalProperties": {"$ref": "#"},
    }


def dataset_schema() -> JsonSchema:
    """Give the schema of a file for ``--dataset_config``."""
    document = DatasetFile.model_json_schema(mode="validation")
    described = {
        CALLED_HERE.get(name, name): option.help
        for name, option in options_of(DatasetOptions).items()
    }
    for table in document["$defs"].values():
        for name, schema in table["properties"].items():
            if name in described:
                schema["description"] = described[name]
    return {"$schema": _DRAFT, **document, "title": "Datasets of sdxl-train"}


def _of_core() -> dict[str, JsonSchema]:
    return {
        name: _property([option])
        for model in CORE_OPTIONS
        for name, option in options_of(model).items()
        if not (model is HostOptions and name in _COMMAND_LINE_ONLY)
    }


def _of_components(entries: Iterable[Entry]) -> dict[str, JsonSchema]:
    return _properties(entry.flags for entry in entries)


def _properties(groups: Iterable[Mapping[str, Option]]) -> dict[str, JsonSchema]:
    """Give a schema for each name: what any of the components that declare it says."""
    declared: dict[str, list[Option]] = {}
    for group in groups:
        for name, option in group.items():
            declared.setdefault(name, []).append(option)
    return {name: _property(options) for name, options in declared.items()}


def _property(options: list[Option]) -> JsonSchema:
    schemas: list[JsonSchema] = []
    for option in options:
        schema = _written(option)
        if schema not in schemas:
            schemas.append(schema)
    described: JsonSchema = {"description": options[0].help}
    default = options[0].default
    if len(schemas) == 1 and isinstance(default, (bool, int, float, str)):
        described["default"] = default
    return described | (schemas[0] if len(schemas) == 1 else {"anyOf": schemas})


def _written(option: Option) -> JsonSchema:
    """Give the schema of a value in a file, where a list of one needs no brackets."""
    schema = {key: value for key, value in option.input_schema.items() if key != "title"}
    items = schema.get("items")
    return {"anyOf": [schema, items]} if schema.get("type") == "array" and items else schema


def _selector(kind: Kind, names: Iterable[str]) -> JsonSchema:
    """Offer the names, take them in any case, and take dotted paths and PLUGIN:NAME."""
    known = sorted(set(names))
    in_any_case = "|".join("".join(map(_either_case, name)) for name in known)
    name: JsonSchema = {
        "anyOf": [{"enum": known}, {"type": "string", "pattern": f"^({in_any_case})$|[.:]"}]
    }
    return {"anyOf": [name, {"type": "array", "items": name}]} if kind.stacked else name


def _either_case(character: str) -> str:
    """Give a regular expression for a character; JSON Schema's know no flag for that."""
    if character.isalpha():
        return f"[{character.lower()}{character.upper()}]"
    return character if character.isalnum() or character in "_-" else f"[{character}]"


def _args(kind: Kind, entries: Iterable[Entry]) -> JsonSchema:
    own = [entry.args for entry in entries if entry.kind is kind]
    return {
        "anyOf": [
            {"type": "object", "properties": _properties(own), "additionalProperties": False},
            {"type": "array", "items": {"type": "string", "pattern": "="}},
            {"type": "string", "pattern": "="},
        ]
    }
