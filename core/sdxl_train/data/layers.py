"""Options that several tables may set: the innermost one counts, and each value has its origin."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from sdxl_train.data.buckets import BucketOptions
from sdxl_train.data.captions import CaptionOptions
from sdxl_train.data.dataset_file import CALLED_HERE
from sdxl_train.data.dataset_options import DEFAULT, DatasetOptions
from sdxl_train.data.views import ViewOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pydantic import BaseModel

OptionsT = TypeVar("OptionsT", BucketOptions, CaptionOptions, ViewOptions)


@dataclass(frozen=True)
class Layer:
    """A table that may set an option, and the place of each of its keys (of itself for "")."""

    table: BaseModel
    place: Callable[[str], str]


class Values:
    """The values of options, from the innermost table outwards, and the origin of each."""

    def __init__(
        self, layers: Sequence[Layer], options: DatasetOptions, place: Callable[[str], str]
    ) -> None:
        self.layers = layers
        self.options = options
        self.place = place
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}

    def get(self, name: str) -> Any:
        """Look up one option; None if neither anybody set it nor it has a default."""
        for layer in self.layers:
            value = getattr(layer.table, name, None)
            if value is not None:
                self.origins[name] = layer.place(name)
                self.values[name] = value
                return value
        option = _ON_COMMAND_LINE.get(name, name)
        if name == "caption_extension" and "caption_extention" in self.options.model_fields_set:
            option = "caption_extention"
        is_set = option in self.options.model_fields_set
        self.origins[name] = self.place(option) if is_set else DEFAULT
        self.values[name] = getattr(self.options, option, None)
        return self.values[name]

    def fill(self, model: type[OptionsT]) -> OptionsT:
        """Look up every field of a dataclass of options; None leaves the field's own default."""
        values = {field.name: self.get(field.name) for field in fields(model)}
        return model(**{name: value for name, value in values.items() if value is not None})


_ON_COMMAND_LINE = {name: option for option, name in CALLED_HERE.items()}
