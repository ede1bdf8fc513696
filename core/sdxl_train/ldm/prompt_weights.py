r"""Weights written into a text, as users of image generators do: ``a (red:1.3) [house]``.

``(x)`` counts 1.1 times, ``[x]`` 1/1.1 times, ``(x:w)`` w times; what stands inside several
brackets has the product. A bracket that is never closed acts to the end of the text. A backslash
takes its meaning from a bracket: ``\(``.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Final

_ROUND: Final = 1.1
_FACTORS: Final = {"(": _ROUND, "[": 1 / _ROUND}
_CLOSES: Final = {")": "(", "]": "["}
_TOKEN = re.compile(
    r"\\(?P<literal>[\\()\[\]])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|[()\[\]]"
    r"|[^\\()\[\]:]+|[\\:]"
)


def weighted_pieces(text: str) -> list[tuple[str, float]]:
    """Part a text where its weight changes; the brackets and numbers are gone from the pieces."""
    pieces: list[str] = []
    weights: list[float] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = open_at[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _FACTORS:
            open_at[token].append(len(pieces))
        elif match["weight"] and open_at["("]:
            close("(", float(match["weight"]))
        elif token in _CLOSES and open_at[_CLOSES[token]]:
            close(_CLOSES[token], _FACTORS[_CLOSES[token]])
        else:
            pieces.append(match["literal"] or token)
            weights.append(1.0)
    for bracket, starts in open_at.items():
        while starts:
            close(bracket, _FACTORS[bracket])
    runs = groupby(zip(pieces, weights, strict=True), key=lambda piece: piece[1])
    return [("".join(piece for piece, _ in run), weight) for weight, run in runs]
