"""Where well-known names come from that no installed plugin has, so that a message can say so."""

from __future__ import annotations

import re

_SIBLINGS: dict[str, dict[str, str]] = {
    "optimizer": {
        r".*(8bit|32bit)|paged.*|bitsandbytes\..*": "sdxl-train-bitsandbytes",
        r"prodigy|prodigyopt\..*": "sdxl-train-prodigy",
        r"lion|came|dadapt.*|.*schedulefree.*|(pytorch_optimizer|schedulefree)\..*": (
            "sdxl-train-optimizers"
        ),
    },
    "model": {r"sd[12]": "sdxl-train-sd"},
    "network": {r"lycoris\..*|loha|full|ia3|oft|boft|dylora|diag-oft": "sdxl-train-lycoris"},
}
"""The distributions that are developed with this one, by kind and by the names that they bring."""


def sibling_with(kind: str, name: str) -> str | None:
    """Name the distribution that usually brings a component; None if nobody is known to."""
    patterns = _SIBLINGS.get(kind, {}).items()
    return next((dist for pattern, dist in patterns if re.fullmatch(pattern, name.lower())), None)
