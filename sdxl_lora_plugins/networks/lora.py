"""LoRA (Hu et al. 2022): ``y = W x + (alpha / r) B A x`` with ``A`` [r, in] and ``B`` [out, r]."""

from __future__ import annotations

import logging
import math
import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from sdxl_lora_plugins.networks import fused
from sdxl_lora_plugins.networks.adapter import AdaptedLayer, LayerAdapter, initial_device

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sdxl_lora_plugins.networks import Lora
    from sdxl_lora_plugins.networks.targets import Target
    from sdxl_train import LoadedModel


_log = logging.getLogger(__name__)


class LoraLayer(AdaptedLayer):
    """The low-rank delta of one layer.

    ``lora_down`` starts as sd-scripts does (Kaiming uniform with a = sqrt(5)), ``lora_up`` at
    zero, so a fresh layer changes nothing.
    """

    def __init__(self, target: Target, options: Lora) -> None:
        super().__init__(target, options)
        layer, rank, device = target.layer, target.rank, initial_device(target.layer)
        self.lora_down: nn.Linear | nn.Conv2d
        self.lora_up: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Linear):
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False, device=device)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False, device=device)
        else:
            self.lora_down = nn.Conv2d(
                layer.in_channels,
                rank,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                bias=False,
                device=device,
            )
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        # Kalajdzievski 2023: alpha / sqrt(r) keeps the delta's size whatever the rank.
        # Files have no word for it, so their alpha takes the difference.
        self.alpha = target.alpha * (math.sqrt(rank) if options.rs_lora else 1.0)
        self.scale = self.alpha / rank
        # In a tuple: as an attribute the frozen layer would be a part of this one.
        self._frozen = (layer,)
        self._is_fused = fused.can_fuse(layer)
        self.dora_scale: nn.Parameter | None = None
        if options.dora_wd:
            self.dora_scale = nn.Parameter(_norm_by_input(layer.weight))

    def adapted(self, x: Tensor) -> Tensor:
        """Give the output with the delta and, for DoRA, with the norm of its own."""
        if self.dora_scale is not None:
            x = self._normalized(x)
        down, up = self.lora_down.weight, self.lora_up.weight
        if self._is_fused and not self.drops:
            return fused.adapted(x, self._frozen[0], down, up, self.scale)
        low = self.dropped(self.lora_down(x))
        return torch.add(self._base_forward(x), self.lora_up(low), alpha=self.scale)

    def tensors(self) -> dict[str, Tensor]:
        """Give the factors and ``alpha``, with which the scale is ``alpha / rank``."""
        tensors = {
            "alpha": torch.tensor(self.alpha),
            "lora_down.weight": self.lora_down.weight.detach(),
            "lora_up.weight": self.lora_up.weight.detach(),
        }
        if self.dora_scale is not None:
            tensors["dora_scale"] = self.dora_scale.detach()
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors that have the names and shapes of :meth:`tensors`."""
        self.lora_down.weight.copy_(tensors["lora_down.weight"])
        self.lora_up.weight.copy_(tensors["lora_up.weight"])
        if self.dora_scale is not None:
            self.dora_scale.copy_(tensors["dora_scale"])

    def norm(self) -> Tensor:
        """Give the Frobenius norm of the delta weight, without making it: |BA|^2 = <B'B, AA'>."""
        down, up = self.lora_down.weight.flatten(1), self.lora_up.weight.flatten(1)
        squared = ((up.T @ up) * (down @ down.T)).sum()
        return squared.clamp(min=0).sqrt() * self.scale

    def shrink(self, ratio: Tensor) -> None:
        """Multiply both factors by the root of the ratio."""
        for factor in (self.lora_down.weight, self.lora_up.weight):
            factor.mul_(ratio.sqrt())

    def plus_parameters(self) -> list[nn.Parameter]:
        """Give ``lora_up`` (Hayou et al. 2024)."""
        return list(self.lora_up.parameters())

    def _normalized(self, x: Tensor) -> Tensor:
        """Scale the input so that the merged weight has the norm ``dora_scale`` by input channel.

        DoRA (Liu et al. 2024, equation 5) for the axis that image UIs read: scaling a column of
        the weight is scaling its input. The norm is a constant for the gradient (section 4.3).
        """
        assert self.dora_scale is not None
        factor = (self.dora_scale / self._merged_norm()).flatten()
        if isinstance(self.lora_down, nn.Conv2d):
            factor = factor[:, None, None]
        # In fp32: a bf16 factor near 1 moves in steps of a 128th.
        return (x.float() * factor).to(x.dtype)

    @torch.no_grad()
    def _merged_norm(self) -> Tensor:
        down, up = self.lora_down.weight, self.lora_up.weight
        with torch.autocast(down.device.type, enabled=False):
            frozen = self._frozen[0].weight
            delta = up.flatten(1) @ down.flatten(1) * self.scale
            return _norm_by_input(frozen + delta.view(frozen.shape))


def _norm_by_input(weight: Tensor) -> Tensor:
    """Give the norm of each input channel [1, in(, 1, 1)] in fp32, never zero."""
    others = [dim for dim in range(weight.ndim) if dim != 1]
    norm: Tensor = torch.linalg.vector_norm(weight.detach().float(), dim=others, keepdim=True)
    return norm + torch.finfo(norm.dtype).eps


class LoraAdapter(LayerAdapter):
    """LoRA on every chosen layer."""

    layers: dict[str, LoraLayer]  # type: ignore[assignment]

    def __init__(self, model: LoadedModel, options: Lora) -> None:
        super().__init__(model, options, lambda target: LoraLayer(target, options))
        attention = [
            layer.alpha for name, layer in self.layers.items() if re.search(r"_attn[12]_to_", name)
        ]
        is_planned = any(target.layer.weight.is_meta for target in self.targets)
        if len(set(attention)) > 1 and not is_planned:
            _log.warning(
                "attention layers have different alphas, for which diffusers 0.42 takes the most "
                "common one when it reads kohya's naming; save or convert for it in its own"
            )
