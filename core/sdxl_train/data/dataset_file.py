"""The dataset file: ``[general]``, ``[[datasets]]`` and ``[[datasets.subsets]]``, in TOML or JSON.

The keys are those of sd-scripts. A key that is not set here is looked up further out: subset,
dataset, general, then the command line (:mod:`.dataset_config`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sdxl_train.data.dataset_options import (
    Count,
    DatasetOptions,
    Extension,
    Interpolation,
    Positive,
    Range,
    Resolution,
    Separator,
    Share,
)
from sdxl_train.data.json_files import parse_json
from sdxl_train.errors import Problem, UserError
from sdxl_train.toml_files import KeyPath, read_text, read_toml
from sdxl_train.wording import describe, nearest, suggestion

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from pydantic_core import ErrorDetails


def _only_one(value: float) -> float:
    if value != 1:
        raise ValueError(
            f"is {value:g}, and only 1 can be trained: sd-scripts keeps the value and never uses it"
        )
    return value


class CustomAttributes(BaseModel):
    """Marks of a subset's samples that the training knows."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    diff_output_preservation: bool = Field(
        False, description="Train these samples to what the model gives without the network."
    )


class SubsetDefaults(BaseModel):
    """Keys of a subset that a dataset, or ``[general]``, may set for all of its subsets."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    num_repeats: Positive | None = None
    caption_extension: Extension | None = None
    class_tokens: str | None = Field(None, description="Caption of images that have none.")
    shuffle_caption: bool | None = None
    caption_separator: Separator | None = None
    keep_tokens: Count | None = None
    keep_tokens_separator: str | None = None
    secondary_separator: Separator | None = None
    enable_wildcard: bool | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: Share | None = None
    caption_dropout_every_n_epochs: Count | None = None
    caption_tag_dropout_rate: Share | None = None
    token_warmup_min: Count | None = None
    token_warmup_step: Annotated[float, Field(ge=0)] | None = None
    flip_aug: bool | None = None
    color_aug: bool | None = None
    random_crop: bool | None = None
    face_crop_aug_range: Range | None = None
    resize_interpolation: Interpolation | None = None
    alpha_mask: bool | None = None
    cache_info: bool | None = None
    custom_attributes: CustomAttributes | None = Field(
        None, description="Marks that the training knows."
    )


class SubsetTable(SubsetDefaults):
    """One folder, or metadata file, of images: ``[[datasets.subsets]]``."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["image_dir"]}, {"required": ["metadata_file"]}]}
    )

    image_dir: str | None = Field(None, min_length=1, description="Folder of images.")
    metadata_file: str | None = Field(
        None, min_length=1, description="JSON or JSONL file with captions and tags of images."
    )
    is_reg: bool | None = Field(None, description="Whether these are regularization images.")
    conditioning_data_dir: str | None = Field(None, min_length=1)


class DatasetDefaults(SubsetDefaults):
    """What ``[general]`` may set for all datasets."""

    batch_size: Positive | None = None
    resolution: Resolution | None = None
    enable_bucket: bool | None = None
    min_bucket_reso: Positive | None = None
    max_bucket_reso: Positive | None = None
    bucket_reso_steps: Positive | None = None
    bucket_no_upscale: bool | None = None
    network_multiplier: Annotated[float, AfterValidator(_only_one)] | None = Field(
        None, description="For sd-scripts' users; only 1 is taken."
    )
    validation_split: Share | None = None
    validation_seed: Count | None = None


class DatasetTable(DatasetDefaults):
    """Subsets that share a resolution and a batch size: ``[[datasets]]``."""

    subsets: list[SubsetTable] = Field(min_length=1)


class DatasetFile(BaseModel):
    """A whole dataset file."""

    model_config = SubsetDefaults.model_config

    general: DatasetDefaults = DatasetDefaults()
    datasets: list[DatasetTable] = Field(min_length=1)


@dataclass(frozen=True)
class KeyPlaces:
    """Where the keys of a file stand."""

    path: Path
    lines: Mapping[KeyPath, int]

    def of(self, key: KeyPath) -> str:
        """Name a key: ``data.toml:7: datasets[0].subsets[1].num_repeats``.

        Without the line where it is not known; a missing key gets the line of its table.
        """
        line = self.lines.get(key) or self.lines.get(key[:-1])
        place = f"{self.path}:{line}" if line else str(self.path)
        return f"{place}: {_dotted(key)}" if key else place

    @property
    def is_json(self) -> bool:
        """Whether the file is written in JSON."""
        return self.path.suffix.lower() == ".json"

    def table(self, name: str) -> str:
        """Name a table as one writes it in this file."""
        if self.is_json:
            return f'"{name.rpartition(".")[2]}"'
        return f"[{name}]" if name == "general" else f"[[{name}]]"


CALLED_HERE = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats"}
"""Options of the command line that have another name in the file."""

_LEVELS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("datasets.subsets", SubsetTable),
    ("datasets", DatasetTable),
    ("general", DatasetDefaults),
)


_DECISIVE = {
    *("image_dir", "metadata_file", "conditioning_data_dir", "alpha_mask", "is_reg"),
    *("resolution", "enable_bucket", "bucket_no_upscale", "bucket_reso_steps"),
    *("min_bucket_reso", "max_bucket_reso", "caption_extension", "validation_split"),
}
"""Keys without which other things would look wrong."""


def read_dataset_file(path: Path) -> tuple[DatasetFile, KeyPlaces, list[Problem]]:
    """Read and check a dataset file.

    Returns:
        The file without the keys that are wrong, the places of all keys, and what is wrong.

    Raises:
        UserError: With every mistake in it, where no more can be said without what is wrong.
    """
    document, lines = (
        (parse_json(read_text(path), path), {})
        if path.suffix.lower() == ".json"
        else read_toml(path)
    )
    places = KeyPlaces(path, lines)
    sourceless = list(_sourceless(document, places))
    faults: list[ErrorDetails] = []
    file: DatasetFile | None
    try:
        file = DatasetFile.model_validate(document)
    except ValidationError as error:
        faults = error.errors()
        file = None if sourceless else _without(document, faults)
    problems = [
        *(
            _problem(fault["loc"], fault["type"], fault.get("input"), fault, places)
            for fault in faults
        ),
        *sourceless,
    ]
    if file is None or sourceless:
        raise UserError(problems)
    return file, places, problems


def _without(document: object, faults: Iterable[ErrorDetails]) -> DatasetFile | None:
    """Give a file without the keys that are wrong; None where others cannot be judged then."""
    rest = copy.deepcopy(document)
    for fault in faults:
        holder: Any = rest
        for part in fault["loc"][:-1]:
            holder = holder[part]
        name = "".join(map(str, fault["loc"][-1:]))
        is_missing = fault["type"] == "missing" or not isinstance(holder, dict)
        if is_missing or nearest(name, _DECISIVE):
            return None
        holder.pop(name, None)
    try:
        return DatasetFile.model_validate(rest)
    except ValidationError:
        return None


def _sourceless(document: object, places: KeyPlaces) -> Iterator[Problem]:
    """Yield the subsets that name no images, even where other mistakes hide them from the model."""
    for number, dataset in enumerate(_tables(document, "datasets")):
        for index, subset in enumerate(_tables(dataset, "subsets")):
            if isinstance(subset, dict) and not {"image_dir", "metadata_file"} & subset.keys():
                yield Problem(
                    place=places.of(("datasets", number, "subsets", index, "image_dir")),
                    message="is required",
                    remedy="set image_dir, or metadata_file",
                )


def _tables(document: object, key: str) -> list[object]:
    found = document.get(key) if isinstance(document, dict) else None
    return found if isinstance(found, list) else []


def _problem(
    loc: tuple[int | str, ...], kind: str, value: object, detail: Any, places: KeyPlaces
) -> Problem:
    """Put one complaint of pydantic into words."""
    place = places.of(loc)
    match kind:
        case "extra_forbidden":
            message, remedy = _unknown_key(loc, places)
        case "missing" if loc == ("datasets",):
            message = "has no datasets"
            remedy = f"add {places.table('datasets')} and {places.table('datasets.subsets')}"
        case "missing" if loc[-1] == "subsets":
            message = "has no subsets"
            remedy = f"add {places.table('datasets.subsets')} with an image_dir"
        case "missing":
            message, remedy = "is required", f"set {loc[-1]}"
        case "too_short":
            message, remedy = "is empty", f"add an entry to {places.table(_table_name(loc))}"
        case "list_type" if loc[-1] in ("datasets", "subsets"):
            message, table = "must be a list of tables", places.table(_table_name(loc))
            remedy = f"write {table}{': [{...}]' if places.is_json else ' with two brackets'}"
        case "value_error":
            message, remedy = str(detail["ctx"]["error"]), ""
        case _:
            message, remedy = f"{value!r} is not {_expected(loc)}", ""
    return Problem(place=place, message=message, remedy=remedy)


def _unknown_key(loc: tuple[int | str, ...], places: KeyPlaces) -> tuple[str, str]:
    """Say what is wrong with a key that its table does not have, and where it may belong."""
    key, table = str(loc[-1]), _table_of(loc)
    legal = set(table.model_fields)
    message = "is not a key of this table"
    called = {**CALLED_HERE, "caption_extention": "caption_extension"}.get(key)
    if called in legal:
        return message, f"in this file it is called {called}"
    key = called or key
    homes = [places.table(name) for name, model in _LEVELS if key in model.model_fields]
    if homes:
        home = f"belongs in {' or '.join(homes)}"
        return message, f"it is called {called} and {home}" if called else f"it {home}"
    if key in DatasetOptions.model_fields and key not in CALLED_HERE:
        return message, f"set it for the whole run: --{key}"
    return message, suggestion(key, sorted(legal)) or f"known are {', '.join(sorted(legal))}"


def _table_of(loc: tuple[int | str, ...]) -> type[BaseModel]:
    if "custom_attributes" in loc[:-1]:
        return CustomAttributes
    if "subsets" in loc[:-1]:
        return SubsetTable
    if "general" in loc[:-1]:
        return DatasetDefaults
    return DatasetTable if "datasets" in loc[:-1] else DatasetFile


def _expected(loc: tuple[int | str, ...]) -> str:
    if not loc:
        return "an object with datasets"
    table = _table_of(loc)
    field = table.model_fields.get(str(loc[-1]))
    if field is None:
        return "a table"
    return describe(TypeAdapter(field.rebuild_annotation()).json_schema())


def _table_name(loc: tuple[int | str, ...]) -> str:
    return ".".join(part for part in loc if isinstance(part, str))


def _dotted(key: KeyPath) -> str:
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
