"""Values that are given block by block of the U-Net.

Which blocks there are, and in which order, is the base model's to say: blocks down, in the middle
and up, as ``input_4``, ``middle_1`` or ``output_0``, perhaps between stems that have other names.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BeforeValidator, WithJsonSchema

from sdxl_train import Field, named_values, read_values

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_GROUPS: Final = ("input", "middle", "output")
_SHAPES: Final[dict[str, Callable[[float], float]]] = {
    "sine": lambda depth: math.sin(math.pi / 2 * depth),
    # Of the reversed sine, so that it ends in 0 and not in the rounding of pi.
    "cosine": lambda depth: math.sin(math.pi / 2 * (1 - depth)),
    "linear": lambda depth: depth,
    "reverse_linear": lambda depth: 1 - depth,
    "zeros": lambda depth: 0.0,
}


def values_by_block(
    values: Sequence[float | None] | Mapping[str, float], names: Sequence[str]
) -> dict[str, float | None]:
    """Give each block its value, None where nothing was said of it.

    Raises:
        ValueError: If they are not as many as the blocks, or there is no such block.
    """
    try:
        return named_values(values, names, groups=_GROUPS, spelling=_plain)
    except ValueError as error:
        named = "; or name blocks, as in input_4=8,middle=16,output_*=4"
        hint = "" if isinstance(values, dict) or not names else named
        raise ValueError(f"{error}{hint}") from None


def factors_by_block(
    value: str | list[float], names: Sequence[str], group: str
) -> dict[str, float]:
    """Give each block of a group its factor: numbers, missing ones 1, or the name of a shape.

    Raises:
        ValueError: If there are more of them than blocks.
    """
    own = [name for name in names if name.startswith(group)]
    if isinstance(value, str):
        name, _, base = value.partition("+")
        last = max(len(own) - 1, 1)
        values = [_SHAPES[name](index / last) + float(base or 0) for index in range(len(own))]
    else:
        values = value
    if len(values) > len(own):
        raise ValueError(f"{len(values)} values for {len(own)} blocks")
    return dict(zip(own, [*values, *[1.0] * (len(own) - len(values))], strict=True))


def _plain(name: str) -> str:
    """Give the short name of a block: ``input_4`` for ``input_blocks.4`` or ``input_blocks_4``."""
    return name.lower().replace(".", "_").replace("_blocks", "").replace("_block", "")


def _read_factors(value: object, *, shapes: Sequence[str]) -> object:
    """Read numbers, an empty one as 0, or the name of a shape and what to add to it."""
    if isinstance(value, str):
        text = value.replace(" ", "")
        name, _, base = text.partition("+")
        if name in shapes and re.fullmatch(r"([0-9]*\.?[0-9]*)?", base):
            return text
        try:
            return [float(item) if item.strip() else 0.0 for item in value.split(",")]
        except ValueError:
            named = f", nor one of {', '.join(shapes)} with +NUMBER behind it" if shapes else ""
            raise ValueError(f"'{value}' is no list of numbers{named}") from None
    return [value] if isinstance(value, (int, float)) else value


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

_Factors = list[Annotated[float, Field(ge=0)]]
BlockFactors = Annotated[
    str | _Factors,
    BeforeValidator(partial(_read_factors, shapes=tuple(_SHAPES)), json_schema_input_type=_Written),
    _TEXT,
]
"""Factors for the blocks of a half: numbers, or a shape such as ``cosine`` or ``linear+.25``."""
MiddleFactors = Annotated[
    _Factors,
    BeforeValidator(partial(_read_factors, shapes=()), json_schema_input_type=_Written),
    _TEXT,
]
"""Factors for the blocks in the middle."""
