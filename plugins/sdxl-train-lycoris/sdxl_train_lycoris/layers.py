"""One adapted layer: factors, initialisation and delta are lycoris-lora's, the forward is ours.

The library's own forward adds the delta weight to the frozen one and subtracts that again, which
rounds small deltas away when the frozen weights are bf16. Its merged weights scale LoHa and LoKr
by alpha/rank twice (4.1.3); files are therefore written with alpha equal to the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from sdxl_train_lycoris.networks import LycorisNetwork
    from sdxl_train_lycoris.targets import Target


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """How one of the library's modules keeps its delta.

    Attributes:
        module: Its class.
        weight: Makes the delta weight of a module, shaped like the layer's, on a device. Rank
            dropout is in it.
        carriers: The factors that take up scalars in a file: the first one that is there.
        folds_scale: Whether alpha/rank goes into the carrier too.
        bypass_is_cheaper: Whether the factors can be applied without making the delta weight.
    """

    module: type[Any]
    weight: Callable[[Any, torch.device], Tensor]
    carriers: tuple[str, ...]
    folds_scale: bool
    bypass_is_cheaper: bool


ALGORITHMS = {
    "lora": Algorithm(
        module=LoConModule,
        weight=lambda module, device: module.make_weight(device) * module.scale,
        carriers=("lora_up.weight",),
        folds_scale=False,
        bypass_is_cheaper=True,
    ),
    "loha": Algorithm(
        module=LohaModule,
        weight=lambda module, device: module.get_weight(module.shape) * module.scalar,
        carriers=("hada_w1_a",),
        folds_scale=True,
        bypass_is_cheaper=False,
    ),
    "lokr": Algorithm(
        module=LokrModule,
        weight=lambda module, device: module.get_weight(module.shape) * module.scalar,
        carriers=("lokr_w1", "lokr_w1_a"),
        folds_scale=True,
        bypass_is_cheaper=True,
    ),
}


class LycorisLayer(nn.Module):
    """The delta of one layer. Its parameters are fp32, on the layer's device."""

    def __init__(self, target: Target, options: LycorisNetwork) -> None:
        super().__init__()
        self.algorithm = ALGORITHMS[options.algorithm]
        self.module = _library_module(target, options, self.algorithm)
        self.drop = nn.Dropout(options.delta_dropout)
        self.module_dropout = options.module_dropout
        self.norm_by_output = options.wd_on_output
        self.dora_scale = nn.Parameter(self._norm(self._frozen)) if options.decomposes else None
        self.bypass = options.bypass_mode
        if self.bypass is None:
            needs_weight = options.decomposes or options.rank_dropout
            self.bypass = self.algorithm.bypass_is_cheaper and not needs_weight
        self.multiplier = 1.0
        self._base_forward = target.layer.forward

    def forward(self, x: Tensor) -> Tensor:
        """Give the adapted output of the layer for its input."""
        base: Tensor = self._base_forward(x)
        if self.training and self.module_dropout and torch.rand(()) < self.module_dropout:
            return base
        delta: Tensor = self.drop(self._delta(x))
        # Training is spared the kernel.
        return base + (delta if self.multiplier == 1.0 else delta * self.multiplier)

    def state(self) -> dict[str, Tensor]:
        """Give the tensors of a file, whose ``alpha`` is fp32 []."""
        state = {name: factor.detach() for name, factor in self._factors.items()}
        state[self._carrier] = state[self._carrier] * self.module.scalar.detach() * self._folded
        state["alpha"] = torch.tensor(self._file_alpha)
        if self.dora_scale is not None:
            state["dora_scale"] = self.dora_scale.detach()
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a file that has the names and shapes of :meth:`state`."""
        for name, factor in self._factors.items():
            factor.copy_(state[name])
        self._factors[self._carrier].div_(self._folded)
        self.module.scalar.fill_(1.0)
        if self.dora_scale is not None:
            self.dora_scale.copy_(state["dora_scale"])

    def _delta(self, x: Tensor) -> Tensor:
        """Give what the delta adds to the layer's output."""
        module = self.module
        if self.bypass:
            bypassed: Tensor = module.bypass_forward_diff(x)
            return bypassed
        weight = self.algorithm.weight(module, x.device)
        if self.dora_scale is not None:
            # Liu et al. 2024, equation 5; the norm is of the merged weight.
            frozen = self._frozen
            merged = frozen + weight
            weight = merged * (self.dora_scale / self._norm(merged)) - frozen
        added: Tensor = module.op(x, weight.to(x.dtype), None, **module.kw_dict)
        return added

    @property
    def _frozen(self) -> Tensor:
        weight: Tensor = self.module.org_weight
        return weight.detach().float()

    def _norm(self, weight: Tensor) -> Tensor:
        """Give the norm by output or input channel, kept as a dimension, and never zero."""
        kept = 0 if self.norm_by_output else 1
        others = [dim for dim in range(weight.ndim) if dim != kept]
        norm: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
        return norm + torch.finfo(norm.dtype).eps

    @property
    def _factors(self) -> dict[str, nn.Parameter]:
        return {name: factor for name, factor in self.module.named_parameters() if name != "scalar"}

    @property
    def _carrier(self) -> str:
        return next(name for name in self.algorithm.carriers if name in self._factors)

    @property
    def _folded(self) -> float:
        return float(self.module.scale) if self.algorithm.folds_scale else 1.0

    @property
    def _file_alpha(self) -> float:
        if _is_whole(self.module):
            # No client reads it; the rank, often 100000 there, would overflow in fp16 files.
            return 1.0
        scale = 1.0 if self.algorithm.folds_scale else self.module.scale
        return float(scale * self.module.lora_dim)


def _library_module(target: Target, options: LycorisNetwork, algorithm: Algorithm) -> Any:
    """Make the library's module for a layer.

    It is made on the CPU, so that a seed gives the same network on every device. Dropout of
    outputs and DoRA stay off in it: they are done here.
    """
    module = algorithm.module(
        target.name,
        target.layer,
        lora_dim=target.rank,
        alpha=target.alpha,
        rank_dropout=options.rank_dropout,
        rank_dropout_scale=options.rank_dropout_scale,
        use_scalar=options.use_scalar,
        rs_lora=options.rs_lora,
        bypass_mode=False,
        **options.module_options,
    )
    if _is_whole(module):
        # Where there is no rank there is no scale; the library forgets that with rs_lora.
        module.scale = 1.0
    return module.to(target.layer.weight.device)


def _is_whole(module: Any) -> bool:
    """Tell whether a LoKr has neither factor decomposed."""
    return isinstance(module, LokrModule) and module.use_w1 and module.use_w2
