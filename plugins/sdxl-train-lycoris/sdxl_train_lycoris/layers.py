"""One adapted layer: the delta is its algorithm's, the forward is the same for all.

The library's own forward adds the delta weight to the frozen one and subtracts that again, which
rounds small deltas away when the frozen weights are bf16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from sdxl_train import UserError
from sdxl_train_lycoris import deltas
from sdxl_train_lycoris.networks import (
    Boft,
    DiagOft,
    Dylora,
    Full,
    Glora,
    Ia3,
    Loha,
    Lokr,
    Lora,
)
from sdxl_train_lycoris.options import DoraOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sdxl_train_lycoris.targets import Target


class LycorisLayer(nn.Module):
    """The adapted form of one layer. Its parameters are fp32, on the layer's device."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        options = target.options
        self._layer = (target.layer,)
        self.delta = _delta(target).to(target.layer.weight.device)
        self.drop = nn.Dropout(options.delta_dropout)
        self.rank_dropout, self.rescales = options.rank_dropout, options.rank_dropout_scale
        self.module_dropout = options.module_dropout
        self.dora_scale: nn.Parameter | None = None
        self.norm_by_output = False
        can_bypass = isinstance(self.delta, (deltas.LoraDelta, deltas.LokrDelta))
        if isinstance(options, DoraOptions) and options.decomposes and not _is_norm(target.layer):
            self.norm_by_output, can_bypass = options.wd_on_output, False
            self.dora_scale = nn.Parameter(self._norm(self.delta.frozen))
        self.bypass = can_bypass if options.bypass_mode is None else options.bypass_mode
        self.bypass = self.bypass and not isinstance(self.delta, deltas.FullDelta)
        self.multiplier = 1.0
        self._base_forward = target.layer.forward

    def forward(self, x: Tensor) -> Tensor:
        """Give the adapted output of the layer for its input."""
        base: Tensor = self._base_forward(x)
        if self.training and self.module_dropout and torch.rand(()) < self.module_dropout:
            return base
        added: Tensor = self.drop(self._added(x))
        # Training is spared the kernel.
        return base + (added if self.multiplier == 1.0 else added * self.multiplier)

    def state(self) -> dict[str, Tensor]:
        """Give the tensors of a file."""
        state = self.delta.tensors()
        if self.dora_scale is not None:
            state["dora_scale"] = self.dora_scale.detach()
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a file that has the names and shapes of :meth:`state`."""
        self.delta.load(state)
        if self.dora_scale is not None:
            self.dora_scale.copy_(state["dora_scale"])

    def norm(self) -> Tensor:
        """Give the Frobenius norm of the delta weight, fp32 []."""
        with torch.autocast(self.delta.frozen.device.type, enabled=False):
            norm: Tensor = torch.linalg.vector_norm(self.delta.weight())
        return norm

    def shrink(self, ratio: Tensor) -> None:
        """Multiply the delta weight in place."""
        self.delta.shrink(ratio)

    def _added(self, x: Tensor) -> Tensor:
        """Give what the delta adds to the layer's output."""
        layer, kept = self._layer[0], self._kept_rows(x.device)
        if self.bypass:
            added = self.delta.bypass(x)
            axis = 1 if isinstance(layer, nn.Conv2d) else -1
            shape = [1] * added.ndim
            shape[axis] = -1
            return added if kept is None else added * kept.view(shape).to(added.dtype)
        # In fp32: of a rotation in bf16 little but its rounding would be left.
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.delta.weight(), self.delta.bias()
            if kept is not None:
                weight = weight * kept.view(-1, *[1] * (weight.ndim - 1))
                bias = None if bias is None else bias * kept
            if self.dora_scale is not None:
                # Liu et al. 2024, equation 5; the norm is of the merged weight.
                frozen = self.delta.frozen
                merged = frozen + weight
                weight = merged * (self.dora_scale / self._norm(merged)) - frozen
        return _applied(layer, x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _kept_rows(self, device: torch.device) -> Tensor | None:
        """Draw which rows of the delta weight stay [out]; None for all."""
        if not (self.rank_dropout and self.training):
            return None
        rows = len(self._layer[0].weight)
        kept = (torch.rand(rows, device=device) >= self.rank_dropout).float()
        # Where none stayed there is nothing to divide.
        return kept / kept.mean().clamp(min=1 / rows) if self.rescales else kept

    def _norm(self, weight: Tensor) -> Tensor:
        """Give the norm by output or input channel, kept as a dimension, and never zero."""
        kept = 0 if self.norm_by_output else 1
        others = [dim for dim in range(weight.ndim) if dim != kept]
        norm: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
        return norm + torch.finfo(norm.dtype).eps


def _applied(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Give what a layer of another weight and bias would."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.Conv2d):
        how = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.conv2d(x, weight, bias, *how)  # type: ignore[arg-type]
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.GroupNorm, nn.LayerNorm))


def _delta(target: Target) -> deltas.Delta:
    """Make the delta of a layer by its algorithm."""
    if _is_norm(target.layer):
        return deltas.NormDelta(target)
    match target.options:
        case Lora() as options:
            return deltas.LoraDelta(target, options, use_tucker=options.has_core)
        case Loha() as options:
            return deltas.LohaDelta(target, options, use_tucker=options.has_core)
        case Lokr() as options:
            return deltas.LokrDelta(
                target,
                options,
                factor=options.factor,
                decompose_both=options.decompose_both,
                full_matrix=options.full_matrix,
                unbalanced_factorization=options.unbalanced_factorization,
            )
        case Glora() as options:
            return deltas.GloraDelta(target, options)
        case Dylora() as options:
            return deltas.DyloraDelta(target, options)
        case Ia3() as options:
            return deltas.Ia3Delta(target, options)
        case Boft() as options:
            return _butterfly(target, options)
        case DiagOft() as options:
            return deltas.OftDelta(target, options)
        case Full():
            return deltas.FullDelta(target)
    raise AssertionError(target.options)


def _butterfly(target: Target, options: Boft) -> deltas.Delta:
    try:
        return deltas.BoftDelta(target, options)
    except ValueError as error:
        outputs = len(target.layer.weight)
        odd = outputs // (outputs & -outputs)
        raise UserError.of(
            "--network_dim",
            f"{target.rank} is too small for the {outputs} outputs of {target.name}: boft needs "
            "blocks of an even size, a power of two of them",
            f"set it to {2 * odd} or more",
        ) from error
