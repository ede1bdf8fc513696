"""Recipes for resizing: which singular values stay, by scores against references.

The score of a singular value s is ``log10(s * rescale) - sum of w * log10(reference)``, with
weights that are normalised to a sum of 1, as in elias-gaeros' resize_lora:

- ``spn_ckpt``, ``fro_ckpt``: the spectral and the Frobenius norm of the base model's weight;
- ``spn_lora``, ``fro_lora``: those of the delta;
- ``subspace``: what the weight does along the same directions, ``|u W v|``;
- ``params``: the numbers that a rank of this layer costs.

``thr`` keeps what scores at least that; ``size`` the best that fit into so many MiB.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sdxl_train import Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sdxl_lora_plugins.files.lowrank import Svd

_REFERENCES: Final = ("spn_lora", "spn_ckpt", "subspace", "fro_lora", "fro_ckpt", "params")
_OF_BASE: Final = frozenset({"spn_ckpt", "subspace", "fro_ckpt"})
_NUMBERS: Final = ("thr", "size", "rescale")
_EXAMPLE: Final = "write for example fro_ckpt=1,thr=-3.5"
_MIB: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which singular values stay.

    Attributes:
        text: As it was given.
        weights: Of the references, their sum is 1.
        threshold: The least score that stays, if there is one.
        size: The MiB of the result, if that decides.
        rescale: What the delta is multiplied by.
    """

    text: str
    weights: Mapping[str, float]
    threshold: float | None
    size: float | None
    rescale: float = 1.0

    @property
    def needs_base(self) -> bool:
        """Whether scores are against the base model."""
        return not _OF_BASE.isdisjoint(self.weights)

    def file_words(self, least: float) -> str:
        """Name what it made with this least score: ``frockpt1_th-3.55``."""
        words = [f"{key.replace('_', '')}{_number(w)}" for key, w in sorted(self.weights.items())]
        if self.rescale != 1:
            words.append(f"scale{_number(self.rescale)}")
        if self.size is not None:
            words.append(f"size{_number(self.size)}")
        return "_".join([*words, f"th{_number(least)}"])

    def metadata(self, least: float) -> dict[str, str]:
        """Tell what made a file."""
        made = {"recipe": self.text, "threshold": round(least, 6)}
        return {"resize_params": json.dumps(made)}

    def scores(self, svd: Svd, base: Tensor | None) -> Tensor:
        """Score the singular values [k] of a delta; a value of 0 scores -inf.

        Args:
            svd: The delta.
            base: The base model's weight [m, n], where the recipe needs it.
        """
        import torch

        scores = (svd.s.double() * self.rescale).log10()
        for name, weight in self.weights.items():
            reference = _reference(name, svd, base).double()
            scores -= weight * reference.clamp(min=torch.finfo(torch.float64).tiny).log10()
        return scores.nan_to_num(nan=-math.inf, neginf=-math.inf)

    def least(self, scores: Sequence[Tensor], costs: Sequence[int]) -> float:
        """Give the least score that stays.

        Args:
            scores: Those of each layer.
            costs: The bytes of a rank of each layer.
        """
        import torch

        if self.threshold is not None:
            return self.threshold
        assert self.size is not None
        flat, order = torch.cat(list(scores)).sort(descending=True)
        each = torch.tensor(costs).repeat_interleave(torch.tensor([len(s) for s in scores]))
        fit = int((each[order].cumsum(0) <= self.size * _MIB).sum())
        return float(flat[fit - 1]) if fit else math.inf


def _reference(name: str, svd: Svd, base: Tensor | None) -> Tensor:
    """Give what singular values are compared with: one number [], or one for each [k]."""
    import torch

    from sdxl_lora_plugins.files.lowrank import of_matrix

    norm: Tensor
    if name == "spn_lora":
        return svd.s[0]
    if name == "fro_lora":
        norm = torch.linalg.vector_norm(svd.s)
        return norm
    if name == "params":
        return torch.tensor(float(len(svd.u) + svd.v.shape[1]))
    assert base is not None
    if name == "fro_ckpt":
        norm = torch.linalg.vector_norm(base)
        return norm
    if name == "spn_ckpt":
        return of_matrix(base, 1).s[0]
    return (svd.u * (base @ svd.v.mT)).sum(0).abs()


def parse_recipes(text: str, place: str) -> list[Recipe]:
    """Read recipes, separated by colons: ``fro_ckpt=1,thr=-3.5:spn_lora,size=32``.

    Raises:
        UserError: With everything that is wrong with them.
    """
    problems: list[Problem] = []
    recipes = [_parse(part, place, problems) for part in text.split(":")]
    if problems:
        raise UserError(problems)
    return recipes


def _parse(text: str, place: str, problems: list[Problem]) -> Recipe:
    found: dict[str, float] = {}
    for word in text.split(","):
        key, equals, value = (piece.strip() for piece in word.partition("="))
        if key not in (*_REFERENCES, *_NUMBERS):
            known = ", ".join((*_REFERENCES, *_NUMBERS))
            problems.append(Problem(place=place, message=f"{key!r} is none of {known}"))
            continue
        number = _float(value) if equals else 1.0 if key in _REFERENCES else None
        if number is None:
            problems.append(
                Problem(place=place, message=f"{word!r} has no number", remedy=_EXAMPLE)
            )
        elif key in found:
            problems.append(Problem(place=place, message=f"{key} stands twice in {text!r}"))
        found[key] = number if number is not None else 1.0
    weights = {key: found[key] for key in _REFERENCES if found.get(key)}
    total = sum(weights.values())
    messages = [
        (not weights, f"{text!r} has no weight of {', '.join(_REFERENCES)}"),
        (bool(weights) and total <= 0, f"the weights of {text!r} add up to {total:g}"),
        (("thr" in found) == ("size" in found), f"{text!r} needs either thr or size"),
        (found.get("size", 1) <= 0, "size is a number of MiB above 0"),
        (found.get("rescale", 1) <= 0, "rescale is a factor above 0"),
    ]
    problems += [
        Problem(place=place, message=message, remedy=_EXAMPLE)
        for wrong, message in messages
        if wrong
    ]
    return Recipe(
        text=text,
        weights={key: weight / (total or 1.0) for key, weight in weights.items()},
        threshold=found.get("thr"),
        size=found.get("size"),
        rescale=found.get("rescale", 1.0),
    )


def _float(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
