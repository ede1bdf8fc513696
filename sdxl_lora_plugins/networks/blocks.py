"""The 23 blocks of SDXL's U-Net, and values that are given block by block.

The order is sd-scripts': blocks down, in the middle and up, between two stems. The names are SGM's,
as in files, so a block is known from the name of a layer alone.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

from sdxl_train import Field, named_values

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_DOWN: Final = 9
NUM_MID: Final = 3
NUM_UP: Final = 9
BLOCKS: Final = (
    "time_embed",
    *(f"input_blocks.{index}" for index in range(NUM_DOWN)),
    *(f"middle_block.{index}" for index in range(NUM_MID)),
    *(f"output_blocks.{index}" for index in range(NUM_UP)),
    "out",
)
_OFFSETS: Final = {
    "input_blocks": 1,
    "middle_block": 1 + NUM_DOWN,
    "output_blocks": 1 + NUM_DOWN + NUM_MID,
}
_SHAPES: Final[dict[str, Callable[[float], float]]] = {
    "sine": lambda depth: math.sin(math.pi / 2 * depth),
    # Of the reversed sine, so that it ends in 0 and not in the rounding of pi.
    "cosine": lambda depth: math.sin(math.pi / 2 * (1 - depth)),
    "linear": lambda depth: depth,
    "reverse_linear": lambda depth: 1 - depth,
    "zeros": lambda depth: 0.0,
}


def block_of(file_name: str) -> int | None:
    """Give the index of the block that a layer is in, by its name in files without the prefix.

    None means that it is not in the U-Net.
    """
    match = re.match(r"(input_blocks|middle_block|output_blocks)_(\d+)_", file_name)
    if match:
        return _OFFSETS[match[1]] + int(match[2])
    if file_name.startswith(("time_embed_", "label_emb_")):
        return 0
    return len(BLOCKS) - 1 if file_name.startswith("out_") else None


def _by_block(value: object, *, whole: bool) -> object:
    """Read a value for each block, or those of named ones: ``input_4=8,output_*=4``."""
    names = [_plain(block) for block in BLOCKS]
    groups = ("input", "middle", "output")
    return named_values(value, names, whole=whole, groups=groups, spelling=_plain)


def _plain(name: str) -> str:
    """Give the short name of a block: ``input_4`` for ``input_blocks.4`` or ``input_blocks_4``."""
    return name.lower().replace(".", "_").replace("_blocks", "").replace("_block", "")


def _one_for_each(values: list[float | None]) -> list[float | None]:
    if len(values) != len(BLOCKS):
        raise ValueError(
            f"{len(values)} values, expected {len(BLOCKS)}, one for each of {', '.join(BLOCKS)}; "
            "or name blocks, as in input_4=8,middle=16,output_*=4"
        )
    return values


def _read_factors(value: object, count: int, shapes: tuple[str, ...]) -> object:
    """Read numbers, an empty one as 0, or the name of a shape and what to add to it."""
    values: object = value
    if isinstance(value, str):
        name, _, base = value.replace(" ", "").partition("+")
        try:
            if name in shapes:
                shape = _SHAPES[name]
                values = [shape(i / (count - 1)) + float(base or 0) for i in range(count)]
            else:
                values = [float(item) if item.strip() else 0.0 for item in value.split(",")]
        except ValueError:
            named = f", nor one of {', '.join(shapes)} with +NUMBER behind it" if shapes else ""
            raise ValueError(f"'{value}' is no list of numbers{named}") from None
    elif isinstance(value, (int, float)):
        values = [value]
    if isinstance(values, list):
        if len(values) > count:
            raise ValueError(f"{len(values)} values for {count} blocks")
        return values + [1.0] * (count - len(values))
    return values


_TEXT = WithJsonSchema({"type": "string"}, mode="serialization")
_Written = str | float | list[float | str | None] | dict[str, float | str]
BlockRanks = Annotated[
    list[int | None],
    BeforeValidator(partial(_by_block, whole=True), json_schema_input_type=_Written),
    AfterValidator(_one_for_each),
    _TEXT,
]
"""A rank for each block; 0 leaves the block out, None stands for the network's own rank."""
BlockAlphas = Annotated[
    list[float | None],
    BeforeValidator(partial(_by_block, whole=False), json_schema_input_type=_Written),
    AfterValidator(_one_for_each),
    _TEXT,
]
"""An alpha for each block; 0 means the rank, None stands for the network's own alpha."""

_Factors = list[Annotated[float, Field(ge=0)]]
NineFactors = Annotated[
    _Factors,
    BeforeValidator(
        lambda value: _read_factors(value, 9, tuple(_SHAPES)), json_schema_input_type=_Written
    ),
    _TEXT,
]
"""Nine factors: numbers, missing ones 1, or a shape such as ``cosine`` or ``linear+.25``."""
ThreeFactors = Annotated[
    _Factors,
    BeforeValidator(
        lambda value: _read_factors(value, NUM_MID, ()), json_schema_input_type=_Written
    ),
    _TEXT,
]
"""Three factors; missing ones are 1."""
