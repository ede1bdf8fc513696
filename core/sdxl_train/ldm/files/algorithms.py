"""Parametrizations of a layer's delta: the tensors of each, and the shapes that go together.

What is stored for a layer tells its algorithm; shapes are enough, no weights are read. The names
are the ones LyCORIS and kohya write; peft's and older ones of diffusers stand for the same.
"""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Algorithm: TypeAlias = Literal[
    "lora", "loha", "lokr", "full", "norm", "ia3", "oft", "boft", "glora"
]
Shapes: TypeAlias = "Mapping[str, tuple[int, ...]]"

TITLES: Final[dict[Algorithm, str]] = {
    "lora": "LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "full": "full difference",
    "norm": "norm difference",
    "ia3": "(IA)^3",
    "oft": "OFT",
    "boft": "BOFT",
    "glora": "GLoRA",
}
NEEDS_BASE: Final = frozenset({"ia3", "oft", "boft", "glora"})
"""Algorithms whose delta depends on the weight that it is added to. DoRA does in each."""

_VECTORS: Final = frozenset(
    {"alpha", "dora_scale", "rescale", "diff", "diff_b", "w_norm", "b_norm", "weight", "on_input"}
)
"""Tensors that may have fewer than two dimensions; all others are factors."""

_SPELLINGS: Final = {
    "lora_down.weight": r"(lora_down|lora_A(\.\w+)?|lora(_linear_layer)?\.down)\.weight",
    "lora_up.weight": r"(lora_up|lora_B(\.\w+)?|lora(_linear_layer)?\.up)\.weight",
    "dora_scale": r"dora_scale|lora_magnitude_vector(\.\w+)?(\.weight)?",
}
_OTHERS: Final = [
    "alpha",
    "lora_mid.weight",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "diff",
    "diff_b",
    "w_norm",
    "b_norm",
    "oft_blocks",
    "rescale",
    "on_input",
    "a1.weight",
    "a2.weight",
    "b1.weight",
    "b2.weight",
    "bm.weight",
]
_SUFFIX: Final = re.compile(
    "|".join(
        [
            *(f"(?P<s{i}>{pattern})" for i, pattern in enumerate(_SPELLINGS.values())),
            *(re.escape(name) for name in _OTHERS),
        ]
    )
)
_OLD_PROCESSOR: Final = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into a layer's name and the tensor's name in kohya's spelling; None if unknown.

    ``a.lora_A.weight`` gives ``a`` and ``lora_down.weight``.
    """
    # diffusers before 0.22 kept factors in the attention's processor.
    key = _OLD_PROCESSOR.sub(
        lambda m: f".{m[1]}{'.0' if m[1] == 'to_out' else ''}.lora_{m[2]}.weight", key
    )
    for match in re.finditer(r"\.", key):
        found = _SUFFIX.fullmatch(key, match.end())
        if found:
            spellings = (name for i, name in enumerate(_SPELLINGS) if found[f"s{i}"])
            return key[: match.start()], next(spellings, found[0])
    return None


def algorithm_of(shapes: Shapes) -> Algorithm | None:
    """Tell the algorithm of a layer from the tensors that are stored for it."""
    marks: dict[str, Algorithm] = {
        "lora_down.weight": "lora",
        "lora_up.weight": "lora",
        "hada_w1_a": "loha",
        "lokr_w1": "lokr",
        "lokr_w1_a": "lokr",
        "diff": "full",
        "diff_b": "full",
        "w_norm": "norm",
        "on_input": "ia3",
        "a1.weight": "glora",
    }
    if "oft_blocks" in shapes:
        return "boft" if len(shapes["oft_blocks"]) == 4 else "oft"
    return next((algorithm for mark, algorithm in marks.items() if mark in shapes), None)


def rank_of(algorithm: Algorithm, shapes: Shapes) -> int | None:
    """Give the rank that scales a layer's delta; None where there is none (LoKr of whole factors).

    Of OFT it is the size of the blocks.
    """
    for name, axis in (
        ("lora_down.weight", 0),
        ("hada_w1_b", 0),
        ("lokr_w2_b", 0),
        ("lokr_w1_b", 0),
        ("a2.weight", 0),
        ("oft_blocks", -1),
    ):
        if name in shapes:
            return shapes[name][axis]
    return None


def weight_shape(algorithm: Algorithm, shapes: Shapes) -> tuple[int, ...] | None:
    """Give the shape of the weight that a layer's delta is for, or None if it does not tell.

    Where factors are flat the shape is flat too: [out, in k k]. Shapes must fit together.
    """
    if algorithm == "lora":
        up, down = shapes["lora_up.weight"], shapes["lora_down.weight"]
        kernel = shapes.get("lora_mid.weight", down)[2:]
        return (up[0], down[1], *kernel)
    if algorithm == "loha":
        if "hada_t1" in shapes:
            rows, columns = shapes["hada_w1_a"][1], shapes["hada_w1_b"][1]
            return (rows, columns, *shapes["hada_t1"][2:])
        return (shapes["hada_w1_a"][0], shapes["hada_w1_b"][1])
    if algorithm == "lokr":
        return _lokr_shape(shapes)
    if algorithm in ("full", "norm"):
        return next((shapes[name] for name in ("diff", "w_norm") if name in shapes), None)
    if algorithm == "glora":
        down = shapes["b2.weight"]
        kernel = shapes.get("bm.weight", down)[2:]
        return (shapes["b1.weight"][0], down[1], *kernel)
    return None


def _lokr_shape(shapes: Shapes) -> tuple[int, ...]:
    w1 = shapes.get("lokr_w1") or (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
    if "lokr_w2" in shapes:
        w2 = shapes["lokr_w2"]
    elif "lokr_t2" in shapes:
        kernel = shapes["lokr_t2"][2:]
        w2 = (shapes["lokr_w2_a"][1], shapes["lokr_w2_b"][1], *kernel)
    else:
        w2 = (shapes["lokr_w2_a"][0], shapes["lokr_w2_b"][1])
    return (w1[0] * w2[0], w1[1] * w2[1], *w2[2:])


def dora_axis(algorithm: Algorithm, shapes: Shapes) -> Literal["input", "output"] | None:
    """Tell along which axis DoRA's norms are, by their shape; None without DoRA or a fit.

    [1, in(, 1, 1)] is LyCORIS's older and image UIs' convention; [out, 1(, 1, 1)] LyCORIS's newer
    one, and [out] peft's.
    """
    norms, weight = shapes.get("dora_scale"), weight_shape(algorithm, shapes)
    if norms is None or weight is None:
        return None
    if norms[0] == weight[0] == prod(norms):
        return "output"
    is_row = len(norms) > 1 and norms[1] == prod(norms)
    # The weight of flat factors is flat: its columns are inputs times the kernel.
    return "input" if is_row and prod(weight[1:]) % norms[1] == 0 else None


def shape_faults(algorithm: Algorithm, shapes: Shapes) -> Iterator[str]:
    """Yield why the tensors of a layer cannot be its delta: some are missing, or do not fit."""
    for name, shape in shapes.items():
        if prod(shape) == 0:
            yield f"{name} has no elements: its shape is {list(shape)}"
        elif name == "alpha" and prod(shape) != 1:
            yield f"alpha has shape {list(shape)}, expected one number"
        elif name not in _VECTORS and len(shape) < 2:
            yield f"{name} has shape {list(shape)}, expected a matrix"
    if any(name not in _VECTORS and len(shape) < 2 for name, shape in shapes.items()):
        return
    if missing := sorted(_required(algorithm, shapes) - shapes.keys()):
        yield f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        return
    for first, axis, second, other in _joints(shapes):
        if first in shapes and second in shapes and shapes[first][axis] != shapes[second][other]:
            yield (
                f"{first} {list(shapes[first])} and {second} {list(shapes[second])} do not fit "
                "together"
            )
            return
    if "dora_scale" in shapes and dora_axis(algorithm, shapes) is None:
        yield (
            f"dora_scale {list(shapes['dora_scale'])} fits neither the inputs nor the outputs of "
            f"{list(weight_shape(algorithm, shapes) or ())}"
        )


def _joints(shapes: Shapes) -> Iterator[tuple[str, int, str, int]]:
    """Yield axes of two tensors that are the same rank."""
    yield "lora_up.weight", 1, "lora_mid.weight", 0
    yield "lora_mid.weight", 1, "lora_down.weight", 0
    if "lora_mid.weight" not in shapes:
        yield "lora_up.weight", 1, "lora_down.weight", 0
    for first, second, core in (
        ("hada_w1_a", "hada_w1_b", "hada_t1"),
        ("hada_w2_a", "hada_w2_b", "hada_t2"),
        ("lokr_w1_a", "lokr_w1_b", ""),
        ("lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ):
        # Around a core, factors are kept with the rank in front.
        yield first, 0 if core in shapes else 1, second, 0
        yield core, 0, first, 0
        yield core, 1, second, 0
    yield "a1.weight", 1, "a2.weight", 0
    yield "b1.weight", 1, "bm.weight", 0
    yield "bm.weight", 1, "b2.weight", 0
    if "bm.weight" not in shapes:
        yield "b1.weight", 1, "b2.weight", 0


def _required(algorithm: Algorithm, shapes: Shapes) -> set[str]:
    """Give the tensors without which those that are there mean nothing."""
    pairs: dict[Algorithm, set[str]] = {
        "lora": {"lora_down.weight", "lora_up.weight"},
        "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
        "ia3": {"weight", "on_input"},
        "glora": {"a1.weight", "a2.weight", "b1.weight", "b2.weight"},
    }
    if algorithm == "loha" and shapes.keys() & {"hada_t1", "hada_t2"}:
        return pairs["loha"] | {"hada_t1", "hada_t2"}
    if algorithm != "lokr":
        return pairs.get(algorithm, set())
    required: set[str] = set()
    for factor in ("lokr_w1", "lokr_w2"):
        if factor not in shapes:
            required |= {f"{factor}_a", f"{factor}_b"}
    return required
