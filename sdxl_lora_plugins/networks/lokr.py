"""LoKr (Yeh et al. 2024): the delta is a Kronecker product, ``y = W x + (w1 (x) w2) x``.

``w1`` is [o1, i1] and ``w2`` [o2, i2(, k, k)] with ``o1 o2`` outputs and ``i1 i2`` inputs; each may
be the product of two factors of low rank. The Kronecker product is never made: ``w2`` acts on the
input seen as [i1, i2], then ``w1`` mixes the results.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from sdxl_lora_plugins.networks.adapter import AdaptedLayer, LayerAdapter, initial_device

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sdxl_lora_plugins.networks import Lokr
    from sdxl_lora_plugins.networks.targets import Target
    from sdxl_train import LoadedModel


class LokrLayer(AdaptedLayer):
    """The Kronecker delta of one layer.

    The factors start as LyCORIS's do: Kaiming uniform with a = sqrt(5), and ``w2``, or its second
    factor, at zero, so a fresh layer changes nothing.
    """

    def __init__(self, target: Target, options: Lokr) -> None:
        super().__init__(target, options)
        layer = target.layer
        kernel = layer.kernel_size if isinstance(layer, nn.Conv2d) else ()
        (o1, o2), (i1, i2) = (split(size, options.factor) for size in layer.weight.shape[:2])
        device, rank = initial_device(layer), target.rank
        whole1 = not options.decompose_both or rank >= max(o1, i1) / 2
        whole2 = rank >= max(o2, i2) / 2
        if options.full_matrix:
            whole1 = whole2 = True
        self._convolution: dict[str, Any] | None = None
        if isinstance(layer, nn.Conv2d):
            self._convolution = {"stride": layer.stride, "padding": layer.padding}
        self._kernel = (i2, *kernel)
        # Where nothing has a rank there is nothing to scale by.
        self.scale = 1.0 if whole1 and whole2 else target.alpha / rank
        self.w1 = _factor("w1", (o1, i1), None if whole1 else rank, device)
        self.w2 = _factor("w2", (o2, i2, *kernel), None if whole2 else rank, device)
        nn.init.zeros_(list(self.w2.values())[-1])
        self.alpha = 1.0 if whole1 and whole2 else float(rank)

    def adapted(self, x: Tensor) -> Tensor:
        """Give the output with the delta."""
        return torch.add(self._base_forward(x), self.delta(x), alpha=self.scale)

    def delta(self, x: Tensor) -> Tensor:
        """Give what is added to the layer's output for its input, before the scale.

        ``network_dropout`` drops single outputs, ``rank_dropout`` whole output channels.
        """
        return self.dropped(self._linear(x) if self._convolution is None else self._convolved(x))

    def tensors(self) -> dict[str, Tensor]:
        """Give the factors, the scale in the first one, and ``alpha`` equal to the rank.

        Clients disagree about any other alpha, and LyCORIS 4.1 does with itself. Where both factors
        are whole none reads it.
        """
        tensors = {name: factor.detach() for name, factor in self._factors.items()}
        first = next(iter(tensors))
        return {
            "alpha": torch.tensor(self.alpha),
            **tensors,
            first: tensors[first] * self.scale,
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors that have the names and shapes of :meth:`tensors`.

        A scale that is no power of two is undone with the last bit rounded.
        """
        for name, factor in self._factors.items():
            factor.copy_(tensors[name])
        next(iter(self._factors.values())).div_(self.scale)

    def norm(self) -> Tensor:
        """Give the Frobenius norm of the delta weight: the product of those of its factors."""
        norm = torch.tensor(self.scale)
        for factors in (list(self.w1.values()), list(self.w2.values())):
            whole = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
            norm = norm.to(whole.device) * torch.linalg.vector_norm(whole)
        return norm

    def shrink(self, ratio: Tensor) -> None:
        """Multiply every factor by the same root of the ratio, as LyCORIS does."""
        for factor in self._factors.values():
            factor.mul_(ratio ** (1 / len(self._factors)))

    @property
    def _factors(self) -> dict[str, nn.Parameter]:
        """The parameters by their names in files."""
        return {**dict(self.w1.items()), **dict(self.w2.items())}

    def _linear(self, x: Tensor) -> Tensor:
        """Give (w1 (x) w2) x for x [..., i1 i2]."""
        mixed = x.reshape(*x.shape[:-1], -1, self._kernel[0])
        for factor in reversed(list(self.w2.values())):
            mixed = F.linear(mixed, factor)
        for factor in reversed(list(self.w1.values())):
            mixed = torch.matmul(factor, mixed)
        return mixed.flatten(-2)

    def _convolved(self, x: Tensor) -> Tensor:
        """Give the convolution of x [B, i1 i2, h, w] with w1 (x) w2: each of i1 as a sample."""
        assert self._convolution is not None
        mixed = x.reshape(-1, self._kernel[0], *x.shape[2:])
        first, *rest = reversed(list(self.w2.values()))
        mixed = F.conv2d(mixed, first.view(-1, *self._kernel), **self._convolution)
        for factor in rest:
            mixed = F.conv2d(mixed, factor[:, :, None, None])
        size = mixed.shape[1:]
        # matmul, not einsum: that multiplies a rank of 1 element by element, outside of autocast.
        mixed = mixed.reshape(len(x), -1, size.numel())
        for factor in reversed(list(self.w1.values())):
            mixed = torch.matmul(factor, mixed)
        return mixed.view(len(x), -1, *size[1:])


class LokrAdapter(LayerAdapter):
    """LoKr on every chosen layer."""

    def __init__(self, model: LoadedModel, options: Lokr) -> None:
        super().__init__(model, options, lambda target: LokrLayer(target, options))


def split(size: int, factor: int = -1) -> tuple[int, int]:
    """Split a size into two divisors, the smaller one first, as LyCORIS does.

    It is ``factor`` and what remains where that divides; else the largest divisor that is not
    above ``factor`` (unless -1) and not above the root.
    """
    if factor > 0 and size % factor == 0:
        small, large = sorted((factor, size // factor))
        return small, large
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(number for number in range(limit, 0, -1) if size % number == 0)
    return small, size // small


def _factor(
    name: str, shape: tuple[int, ...], rank: int | None, device: torch.device
) -> nn.ParameterDict:
    """Make a factor: whole, or as two of low rank, under their names in files."""
    rows, columns = shape[0], math.prod(shape[1:])
    shapes: dict[str, tuple[int, ...]] = {f"lokr_{name}": shape}
    if rank is not None:
        shapes = {f"lokr_{name}_a": (rows, rank), f"lokr_{name}_b": (rank, columns)}
    factors = nn.ParameterDict()
    for key, size in shapes.items():
        factors[key] = nn.Parameter(torch.empty(size, device=device))
        nn.init.kaiming_uniform_(factors[key], a=math.sqrt(5))
    return factors
