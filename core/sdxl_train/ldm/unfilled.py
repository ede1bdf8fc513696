"""Modules of shapes only, to be planned with or to be given the weights of a file."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from diffusers.models.modeling_utils import no_init_weights

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def without_weights() -> Iterator[None]:
    """Build modules on the meta device, whose initialisers would take long for nothing."""
    with torch.device("meta"), no_init_weights():
        yield
