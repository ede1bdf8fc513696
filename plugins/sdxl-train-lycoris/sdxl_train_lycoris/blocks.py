"""Values for the blocks of the U-Net: 23 of SDXL, 25 of SD 1.x, or those of named blocks."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

from sdxl_train import named_values

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCKS: Final = (
    "time_embed",
    *(f"input_{index}" for index in range(9)),
    *(f"middle_{index}" for index in range(3)),
    *(f"output_{index}" for index in range(9)),
    "out",
)
"""The blocks of SDXL's U-Net in the order of sd-scripts."""
SD1_BLOCKS: Final = (
    *(f"input_{index}" for index in range(12)),
    "middle",
    *(f"output_{index}" for index in range(12)),
)
"""Those of SD 1.x; its ``middle`` is all three of SDXL's."""


def block_of(file_name: str) -> str | None:
    """Name the block that a layer of the U-Net is in, by its name in files without the prefix."""
    match = re.match(r"(input|middle|output)_blocks?_(\d+)_", file_name)
    if match:
        return f"{match[1]}_{match[2]}"
    if file_name.startswith(("time_embed_", "label_emb_")):
        return BLOCKS[0]
    return BLOCKS[-1] if file_name.startswith("out_") else None


def value_of(values: Sequence[float | None] | None, block: str | None) -> float | None:
    """Give the value of a block; None where nothing was said of it."""
    if values is None or block is None:
        return None
    if len(values) == len(BLOCKS):
        return values[BLOCKS.index(block)]
    name = "middle" if block.startswith("middle_") else block
    return values[SD1_BLOCKS.index(name)] if name in SD1_BLOCKS else None


def absent_blocks(values: Sequence[float | None] | None) -> list[str]:
    """Name the blocks of SD 1.x among the values that SDXL does not have."""
    if values is None or len(values) == len(BLOCKS):
        return []
    known = {*BLOCKS, "middle"}
    return [name for name in SD1_BLOCKS if name not in known]


def _short(name: str) -> str:
    """Give ``input_4`` for ``input_blocks.4`` or ``input_blocks_4``."""
    return name.lower().replace(".", "_").replace("_blocks", "").replace("_block", "")


def _read(value: object, *, whole: bool) -> object:
    groups = ("input", "middle", "output")
    return named_values(value, BLOCKS, whole=whole, groups=groups, spelling=_short)


def _counted(values: list[float | None]) -> list[float | None]:
    if len(values) not in (len(BLOCKS), len(SD1_BLOCKS)):
        raise ValueError(
            f"{len(values)} values, expected {len(BLOCKS)}, one for each of {', '.join(BLOCKS)} "
            f"(or the {len(SD1_BLOCKS)} of SD 1.x); or name blocks, as in input_4=8,output_*=4"
        )
    return values


_TEXT = WithJsonSchema({"type": "string"}, mode="serialization")
_Written = str | float | list[float | str | None] | dict[str, float | str]
BlockRanks = Annotated[
    list[int | None],
    BeforeValidator(partial(_read, whole=True), json_schema_input_type=_Written),
    AfterValidator(_counted),
    _TEXT,
]
"""A rank for each block; 0 leaves the block out, None stands for the network's own rank."""
BlockAlphas = Annotated[
    list[float | None],
    BeforeValidator(partial(_read, whole=False), json_schema_input_type=_Written),
    AfterValidator(_counted),
    _TEXT,
]
"""An alpha for each block; 0 means the rank, None stands for the network's own alpha."""
