"""Options that a preset has for single layers, over those of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sdxl_train import Problem, UserError
from sdxl_train_lycoris.networks import ALGORITHMS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdxl_train_lycoris.options import LycorisNetwork

_RANKS = {"dim": ("network_dim", "conv_dim"), "alpha": ("network_alpha", "conv_alpha")}


def overridden(options: LycorisNetwork, override: Mapping[str, Any]) -> LycorisNetwork:
    """Give the options of a layer.

    Args:
        options: Those of the network. What another algorithm has not is left out.
        override: ``algo``, ``dim``, ``alpha``, and options of the algorithm by their names.

    Raises:
        UserError: If it has no such option, or a value is wrong.
    """
    own = dict(override)
    algorithm = str(own.pop("algo", options.algorithm)).lower()
    if algorithm not in ALGORITHMS:
        raise UserError.of(
            "preset", f"there is no algo {algorithm}", f"write one of {', '.join(ALGORITHMS)}"
        )
    kind = ALGORITHMS[algorithm]
    values = {
        name: getattr(options, name) for name in options.model_fields_set & kind.model_fields.keys()
    }
    for name, value in own.items():
        given = [field for field in _RANKS.get(name, (name,)) if field in kind.model_fields]
        values |= dict.fromkeys(given or [name], value)
    try:
        return kind(**values)
    except ValidationError as error:
        raise UserError(
            Problem(
                place="preset",
                message=f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}",
                remedy=f"{algorithm} has {', '.join(sorted(kind.model_fields))}"
                if fault["type"] == "extra_forbidden"
                else "",
            )
            for fault in error.errors()
        ) from None
