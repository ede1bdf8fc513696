"""Values for the blocks of the U-Net: one for each, in their order, or those of named blocks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BeforeValidator, WithJsonSchema

from sdxl_train import named_values, read_values

if TYPE_CHECKING:
    from collections.abc import Sequence

SD1_BLOCKS: Final = (
    *(f"input_{index}" for index in range(12)),
    "middle",
    *(f"output_{index}" for index in range(12)),
)
"""The blocks of SD 1.x; 25 values are for them, whichever blocks a model has: guides show such."""


def values_by_block(
    values: Sequence[float | None] | Mapping[str, float] | None, names: Sequence[str]
) -> dict[str, float | None]:
    """Give each block its value; None, or nothing, where nothing was said of it.

    Raises:
        ValueError: If they are not as many as the blocks, or there is no such block.
    """
    if values is None or not names:
        return {}
    if not isinstance(values, Mapping) and len(values) == len(SD1_BLOCKS) != len(names):
        given = dict(zip(SD1_BLOCKS, values, strict=True))
        # Its middle is all of what other models name one by one.
        return {n: given.get("middle" if n.startswith("middle") else n) for n in names}
    try:
        return named_values(values, names, groups=("input", "middle", "output"), spelling=_short)
    except ValueError as error:
        hint = "" if isinstance(values, Mapping) else "; or name blocks, as in input_4=8,output_*=4"
        raise ValueError(f"{error}{hint}") from None


def absent_blocks(
    values: Sequence[float | None] | Mapping[str, float] | None, names: Sequence[str]
) -> list[str]:
    """Name the blocks of SD 1.x among the values that a model does not have."""
    if values is None or isinstance(values, Mapping) or len(values) != len(SD1_BLOCKS):
        return []
    return [name for name in SD1_BLOCKS if name not in {*names, "middle"}]


def plain_values(
    values: Sequence[float | None] | Mapping[str, float] | None,
) -> list[float | None]:
    """Give the values without their names."""
    return list(values.values() if isinstance(values, Mapping) else values or ())


def _short(name: str) -> str:
    """Give ``input_4`` for ``input_blocks.4`` or ``input_blocks_4``."""
    return name.lower().replace(".", "_").replace("_blocks", "").replace("_block", "")


_TEXT = WithJsonSchema({"type": "string"}, mode="serialization")
_Written = str | float | list[float | str | None] | dict[str, float | str]
BlockRanks = Annotated[
    list[int | None] | dict[str, int],
    BeforeValidator(partial(read_values, whole=True), json_schema_input_type=_Written),
    _TEXT,
]
"""A rank for each block, or for named ones; 0 leaves a block out, None stands for the network's."""
BlockAlphas = Annotated[
    list[float | None] | dict[str, float],
    BeforeValidator(partial(read_values, whole=False), json_schema_input_type=_Written),
    _TEXT,
]
"""An alpha for each block, or for named ones; 0 means the rank, None stands for the network's."""
