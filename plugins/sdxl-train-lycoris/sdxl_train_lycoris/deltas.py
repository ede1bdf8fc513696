"""What each algorithm adds to a layer: its factors, the weight that they make, and its file.

Factors and their start are lycoris-lora's wherever files are right with it. Where they would not be
(4.1.3), it is done here:

- LoHa and LoKr: merged weights are scaled by alpha/rank twice; files have alpha equal to the rank.
- DyLoRA: the forward is larger than the file says by the size of a block, and blocks are drawn from
  a generator that no seed reaches.
- OFT and BOFT: clients read a constraint in different ways; files hold the rotation that it leaves.
- (IA)^3: a bypass scales the bias too, which merged weights do not.
- Norms: rank dropout keeps what it should drop.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from lycoris.functional import boft, diag_oft
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sdxl_train_lycoris.networks import Dylora, Ia3, RotationOptions
    from sdxl_train_lycoris.options import FactorOptions
    from sdxl_train_lycoris.targets import Target


_ROUNDING = 1e-5


class Delta(nn.Module):
    """The delta of one layer. Its parameters are fp32; they are made on the CPU.

    A seed gives the same network on every device then.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        # In a tuple: as an attribute the frozen layer would be a part of this one.
        self._layer = (target.layer,)

    @property
    def frozen(self) -> Tensor:
        """The layer's weight in fp32."""
        return self._layer[0].weight.detach().float()

    @abstractmethod
    def weight(self) -> Tensor:
        """Give the delta of the weight, fp32, shaped as the layer's."""

    def bias(self) -> Tensor | None:
        """Give the delta of the bias, fp32 [out]; None if it has none."""
        return None

    def bypass(self, x: Tensor) -> Tensor:
        """Give what the delta adds to the layer's output, without making :meth:`weight`."""
        raise NotImplementedError

    @property
    @abstractmethod
    def factors(self) -> dict[str, nn.Parameter]:
        """What the file has of its parameters, by the names there."""

    def tensors(self) -> dict[str, Tensor]:
        """Give the tensors of a file; an ``alpha`` is fp32 []."""
        return {name: factor.detach() for name, factor in self.factors.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors that have the names and shapes of :meth:`tensors`."""
        for name, factor in self.factors.items():
            factor.copy_(tensors[name])

    def shrink(self, ratio: Tensor) -> None:
        """Multiply the delta in place by a factor in [0, 1]."""
        for factor in self.factors.values():
            factor.mul_(ratio ** (1 / self._degree))

    @property
    def _degree(self) -> int:
        """How many of the factors are multiplied with each other."""
        return 1

    def plus_parameters(self) -> list[nn.Parameter]:
        """Give the parameters that LoRA+ trains faster."""
        return []


class LibraryDelta(Delta):
    """A delta of factors that are multiplied, kept by a module of the library."""

    module_class: type[Any]
    carriers: tuple[str, ...]
    """The factors that take up scalars in a file: the first one that is there."""
    folds_scale = True
    """Whether alpha/rank goes into the carrier too."""

    def __init__(self, target: Target, options: FactorOptions, **arguments: Any) -> None:
        super().__init__(target)
        self.module = self.module_class(
            target.name,
            target.layer,
            lora_dim=target.rank,
            alpha=target.alpha,
            use_scalar=options.use_scalar,
            rs_lora=options.rs_lora,
            bypass_mode=False,
            **arguments,
        )

    def bypass(self, x: Tensor) -> Tensor:
        """Give what the delta adds to the layer's output, without making :meth:`weight`."""
        added: Tensor = self.module.bypass_forward_diff(x)
        return added

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """Its parameters but the scalar."""
        return {name: factor for name, factor in self.module.named_parameters() if name != "scalar"}

    def tensors(self) -> dict[str, Tensor]:
        """Give the factors, scalars folded into the first carrier, and ``alpha``."""
        tensors = super().tensors()
        for name in self._carriers:
            tensors[name] = tensors[name] * self.module.scalar.detach() * self._folded
        return {**tensors, "alpha": torch.tensor(self._alpha)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors; a folded scale but a power of two is undone with the last bit rounded."""
        super().load(tensors)
        for name in self._carriers:
            self.factors[name].div_(self._folded)
        self.module.scalar.fill_(1.0)

    @property
    def _carriers(self) -> list[str]:
        return [next(name for name in self.carriers if name in self.factors)]

    @property
    def _degree(self) -> int:
        return len(self.factors)

    @property
    def _folded(self) -> float:
        return float(self.module.scale) if self.folds_scale else 1.0

    @property
    def _alpha(self) -> float:
        scale = 1.0 if self.folds_scale else self.module.scale
        return float(scale * self.module.lora_dim)


class LoraDelta(LibraryDelta):
    """B A, with the kernel's own factor between them for Tucker."""

    module_class = LoConModule
    carriers = ("lora_up.weight",)
    folds_scale = False

    def weight(self) -> Tensor:
        """Give the delta of the weight."""
        made: Tensor = self.module.make_weight(self.module.lora_up.weight.device)
        return made * float(self.module.scale)

    def plus_parameters(self) -> list[nn.Parameter]:
        """Give ``lora_up``."""
        return list(self.module.lora_up.parameters())


class LohaDelta(LibraryDelta):
    """(A1 B1) * (A2 B2), element by element."""

    module_class = LohaModule
    carriers = ("hada_w1_a",)

    def weight(self) -> Tensor:
        """Give the delta of the weight."""
        made: Tensor = self.module.get_weight(self.module.shape) * self.module.scalar
        return made


class LokrDelta(LibraryDelta):
    """W1 (x) W2, each whole or of low rank."""

    module_class = LokrModule
    carriers = ("lokr_w1", "lokr_w1_a")

    def __init__(self, target: Target, options: FactorOptions, **arguments: Any) -> None:
        super().__init__(target, options, **arguments)
        if self._is_whole:
            # Where there is no rank there is no scale; the library forgets that with rs_lora.
            self.module.scale = 1.0

    def weight(self) -> Tensor:
        """Give the delta of the weight."""
        made: Tensor = self.module.get_weight(self.module.shape) * self.module.scalar
        return made

    @property
    def _is_whole(self) -> bool:
        return bool(self.module.use_w1 and self.module.use_w2)

    @property
    def _alpha(self) -> float:
        # No client reads it there; the rank, often 100000, would overflow in fp16 files.
        return 1.0 if self._is_whole else super()._alpha


class GloraDelta(LibraryDelta):
    """W A1 A2 + B1 B2."""

    module_class = GLoRAModule
    folds_scale = False

    def weight(self) -> Tensor:
        """Give the delta of the weight."""
        a1, a2, b1 = (getattr(self.module, name).weight.flatten(1) for name in ("a1", "a2", "b1"))
        frozen = self.frozen
        of_weight = torch.einsum("oi...,ir,rj->oj...", frozen, a1, a2)
        beside = (b1 @ self.module.b2.weight.flatten(1)).view(frozen.shape)
        made: Tensor = (of_weight + beside) * (self.module.scale * self.module.scalar)
        return made

    def shrink(self, ratio: Tensor) -> None:
        """Multiply one factor of each product."""
        for name in self._carriers:
            self.factors[name].mul_(ratio)

    @property
    def _carriers(self) -> list[str]:
        return ["a2.weight", "b2.weight"]


class DyloraDelta(Delta):
    """B A of which a step trains one block of ranks, beside those below it."""

    def __init__(self, target: Target, options: Dylora) -> None:
        super().__init__(target)
        self.alpha = target.alpha or float(target.rank)
        self.rank, self.size = target.rank, options.block_size
        rows, columns = target.layer.weight.shape[0], target.layer.weight[0].numel()
        blocks = range(self.rank // self.size)
        self.down = nn.ParameterList([torch.empty(self.size, columns) for _ in blocks])
        self.up = nn.ParameterList([torch.zeros(rows, self.size) for _ in blocks])
        for factor in self.down:
            nn.init.kaiming_uniform_(factor, a=5**0.5)
        self._kernel = tuple(target.layer.weight.shape[1:])

    def weight(self) -> Tensor:
        """Give the delta of the weight: outside of training that of the whole rank."""
        last = len(self.down) - 1
        if self.training and torch.is_grad_enabled():
            # On the CPU, from the stream that the run seeds.
            last = int(torch.randint(len(self.down), ()).item())
        down = [*(factor.detach() for factor in self.down[:last]), self.down[last]]
        up = [*(factor.detach() for factor in self.up[:last]), self.up[last]]
        scale = self.alpha / (self.size * (last + 1))
        return (torch.cat(up, 1) @ torch.cat(down)).view(len(up[0]), *self._kernel) * scale

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """Its blocks."""
        return dict(self.named_parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Give it as a LoRA."""
        up = torch.cat([factor.detach() for factor in self.up], 1)
        return {
            "alpha": torch.tensor(self.alpha),
            "lora_down.weight": torch.cat([factor.detach() for factor in self.down]).view(
                self.rank, *self._kernel
            ),
            "lora_up.weight": up.view(*up.shape, *[1] * (len(self._kernel) - 1)),
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a LoRA."""
        down = torch.split(tensors["lora_down.weight"].flatten(1), self.size)
        up = torch.split(tensors["lora_up.weight"].flatten(1), self.size, 1)
        for own, given in ((self.down, down), (self.up, up)):
            for factor, values in zip(own, given, strict=True):
                factor.copy_(values)

    @property
    def _degree(self) -> int:
        return 2


class Ia3Delta(Delta):
    """W w, by output or by input."""

    def __init__(self, target: Target, options: Ia3) -> None:
        super().__init__(target)
        shape = target.layer.weight.shape
        size = shape[1] if options.train_on_input else shape[0]
        is_convolution = len(shape) > 2
        self.on_input = options.train_on_input
        self.scaling = nn.Parameter(torch.zeros((1, size, 1, 1) if is_convolution else (size,)))

    def weight(self) -> Tensor:
        """Give the delta of the weight."""
        frozen = self.frozen
        shape = [1] * frozen.ndim
        shape[1 if self.on_input else 0] = -1
        return frozen * self.scaling.view(shape)

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The scaling."""
        return {"weight": self.scaling}

    def tensors(self) -> dict[str, Tensor]:
        """Give the scaling, and of what."""
        return {**super().tensors(), "on_input": torch.tensor(int(self.on_input))}


class OftDelta(Delta):
    """(R - 1) W with R of blocks, each the Cayley transform of B - B'."""

    module_class: type[Any] = DiagOFTModule

    def __init__(self, target: Target, options: RotationOptions) -> None:
        super().__init__(target)
        module = self.module_class(
            target.name, target.layer, lora_dim=target.rank, rescaled=options.rescaled
        )
        self.oft_blocks: nn.Parameter = module.oft_blocks
        self.rescale: nn.Parameter | None = module.rescale.float() if options.rescaled else None
        self.limit = options.constraint * len(target.layer.weight)

    def weight(self) -> Tensor:
        """Give the delta of the weight."""
        made: Tensor = diag_oft.diff_weight(self.frozen, self._constrained(), self.rescale)
        return made

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The blocks, and factors of outputs."""
        factors = {"oft_blocks": self.oft_blocks}
        return factors if self.rescale is None else {**factors, "rescale": self.rescale}

    def tensors(self) -> dict[str, Tensor]:
        """Give the blocks as the constraint leaves them, and an ``alpha`` that means none."""
        return {
            **super().tensors(),
            "oft_blocks": self._constrained().detach(),
            "alpha": torch.tensor(0.0),
        }

    def _constrained(self) -> Tensor:
        """Give the blocks, scaled so that the norm of B - B' is at most the limit."""
        if not self.limit:
            return self.oft_blocks
        skew = self.oft_blocks - self.oft_blocks.mT
        norm = torch.linalg.vector_norm(skew) + torch.finfo(skew.dtype).eps
        ratio = self.limit / norm
        # What was loaded has the limit but for its rounding, and stays as it is.
        return self.oft_blocks * torch.where(ratio < 1 - _ROUNDING, ratio, 1.0)


class BoftDelta(OftDelta):
    """The same with R a product of butterfly factors."""

    module_class = ButterflyOFTModule

    def weight(self) -> Tensor:
        """Give the delta of the weight."""
        made: Tensor = boft.diff_weight(self.frozen, self._constrained(), self.rescale)
        return made


class FullDelta(Delta):
    """Weight and bias themselves."""

    weight_name, bias_name = "diff", "diff_b"

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        layer = target.layer
        self.of_weight = nn.Parameter(torch.zeros(layer.weight.shape))
        self.of_bias: nn.Parameter | None = None
        if layer.bias is not None:
            self.of_bias = nn.Parameter(torch.zeros(layer.bias.shape))

    def weight(self) -> Tensor:
        """Give the delta of the weight."""
        return self.of_weight

    def bias(self) -> Tensor | None:
        """Give the delta of the bias."""
        return self.of_bias

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The differences."""
        factors = {self.weight_name: self.of_weight}
        return factors if self.of_bias is None else {**factors, self.bias_name: self.of_bias}


class NormDelta(FullDelta):
    """Weight and bias of a norm."""

    weight_name, bias_name = "w_norm", "b_norm"
