"""The named random streams of a run.

A draw depends on the seed, the purpose and where in the run it is made, and on nothing else. So an
observer, a sample image, a worker count or a save can never change the weights, and a resumed run
needs no saved generator state: it derives the same draws from the same step.
"""

from __future__ import annotations

import hashlib
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


def derive_seed(seed: int, *names: object) -> int:
    """Derive an independent seed in [0, 2**63) from a seed and any names, by hashing."""
    text = "\x1f".join(str(name) for name in (seed, *names))
    # Names of files may be no UTF-8.
    data = text.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def seed_global_generators(seed: int) -> None:
    """Seed the generators of torch, numpy and Python.

    For code that draws from them without asking: dropout layers, initialisers, some optimizers.
    """
    import numpy as np
    import torch

    # As torch.manual_seed, which in each call notes a stack trace for every device that has not
    # been started: a hundredth of a step of a tiny model.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Give back the generators of torch, numpy and Python as they were."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    # Asking a device for its state starts it; others than this run's are not to be touched.
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = [torch.cuda.current_device()] if started else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class Streams:
    """Generators for the draws of a training step, one for each purpose."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.device = device
        self._generators: dict[tuple[str, str], torch.Generator] = {}

    def cpu(self, purpose: str, *where: object) -> torch.Generator:
        """Give the CPU generator of ``purpose`` at this point of the run."""
        return self._at("cpu", purpose, where)

    def on_device(self, purpose: str, *where: object) -> torch.Generator:
        """Give the generator of ``purpose`` on the training device."""
        return self._at(str(self.device), purpose, where)

    def seed_for(self, purpose: str, *where: object) -> int:
        """Give the bare seed, for code that seeds a global generator (dropout layers)."""
        return derive_seed(self.seed, purpose, *where)

    def _at(self, device: str, purpose: str, where: tuple[object, ...]) -> torch.Generator:
        import torch

        key = (device, purpose)
        if key not in self._generators:
            self._generators[key] = torch.Generator(device=device)
        return self._generators[key].manual_seed(self.seed_for(purpose, *where))
