"""A pause in which a run is looked at, sampled or validated, and which training does not notice."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sdxl_train.rng import global_generators_kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from sdxl_train.assembly import Assembly
    from sdxl_train.spread import SpreadModule


class Evaluation:
    """Brackets around what happens to the network beside training.

    Args:
        assembly: The model and the network.
        optimizer: What trains them.
        swaps_weights: The optimizer has ``train()`` and ``eval()``: it trains at other weights
            than those that it hands out (schedule-free, Defazio et al. 2024).
        autocast: The precision of the run.

    Attributes:
        spread: The denoiser, where each process holds a part of its frozen weights only.
    """

    def __init__(
        self,
        assembly: Assembly,
        optimizer: torch.optim.Optimizer,
        *,
        swaps_weights: bool,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.assembly = assembly
        self.optimizer: Any = optimizer
        self.swaps_weights = swaps_weights
        self.autocast = autocast
        self._swapped = False
        self.spread: SpreadModule | None = None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Let training stand still. Where weights are spread, in all processes at once.

        Inside, every module of the model and the network is in evaluation mode, so nothing is
        dropped; the optimizer hands out its final weights; no gradients are recorded; the precision
        is that of the run. On leaving, the weights, the modes of the modules, the network's
        multiplier and the global random states (torch, numpy, Python) are bit for bit as before.
        """
        with ExitStack() as stack:
            if self.spread is not None:
                stack.enter_context(self.spread.whole())
            stack.enter_context(global_generators_kept())
            stack.enter_context(self.final_weights())
            stack.enter_context(self._modes_kept())
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.autocast())
            yield

    @contextmanager
    def final_weights(self) -> Iterator[None]:
        """Put the weights that the optimizer hands out in the place of those that it trains at."""
        if not self.swaps_weights or self._swapped:
            yield
            return
        # Optimizers compute their way back, and rounding would leave the last bits different.
        parameters = self.assembly.parameters
        kept = [parameter.detach().clone() for parameter in parameters]
        self._swapped = True
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()
            self._swapped = False
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.detach().copy_(before)

    @contextmanager
    def _modes_kept(self) -> Iterator[None]:
        adapter = self.assembly.adapter
        roots = self._roots()
        modes = [(module, module.training) for root in roots for module in root.modules()]
        multiplier = adapter.multiplier
        for root in roots:
            root.eval()
        try:
            yield
        finally:
            adapter.multiplier = multiplier
            for module, training in modes:
                module.training = training

    def _roots(self) -> Sequence[nn.Module]:
        model, adapter = self.assembly.model, self.assembly.adapter
        return [model.denoiser, *model.text_encoders, *adapter.modules()]
