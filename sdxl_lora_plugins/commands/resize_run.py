"""The decompositions behind ``sdxl-train resize``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_lora_plugins.commands.written import labelled
from sdxl_lora_plugins.files.lowrank import Svd
from sdxl_lora_plugins.files.plain import decompose, from_svd, weight_shape
from sdxl_train.ldm import delta

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from sdxl_lora_plugins.files.base import BaseWeights
    from sdxl_lora_plugins.files.plain import PlainModule
    from sdxl_train.ldm import Layer, NetworkFile, StoredModule


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A delta and its decomposition.

    Attributes:
        norm: The Frobenius norm of the delta, of which ``svd`` may lack the smallest part.
        shape: Of the layer's weight.
        weight: That of the base model as a matrix [m, n] in fp32, if it was asked for.
    """

    module: StoredModule
    svd: Svd
    norm: float
    shape: tuple[int, ...]
    weight: Tensor | None

    def cut(self, svd: Svd, rescale: float = 1.0) -> Cut:
        """Make a module of what stays of the decomposition."""
        name, before = self.module.name, labelled(self.module)
        if len(svd.s) == 0:
            return Cut(name, None, f"{before} -> left out")
        share = float(svd.s.norm()) / self.norm if self.norm else 1.0
        scaled = Svd(svd.u, svd.s * rescale, svd.v)
        return Cut(
            name,
            from_svd(self.module.layer, self.shape, scaled),
            f"{before} -> {len(svd.s)}, {share:.1%} of the norm",
        )


@dataclass(frozen=True)
class Cut:
    """What is left of a layer: a module, or None; and what to say of it."""

    name: str
    module: PlainModule | None
    told: str


def decomposed(
    file: NetworkFile,
    base: BaseWeights | None,
    most: Callable[[Layer], int | None],
    *,
    with_weights: bool = False,
) -> Iterator[Whole]:
    """Decompose the deltas of a network one by one.

    Args:
        file: The network.
        base: The base model, if there is one.
        most: Gives the singular values of a layer that are wanted, None for all. Of a plain LoRA
            all are at hand.
        with_weights: Whether to read the base model's weights, where no delta depends on them.
    """
    with file.weights() as read:
        for module in file.modules.values():
            tensors = read(module)
            wanted = base is not None and (with_weights or module.needs_base)
            weight = base.weight(module.layer) if base is not None and wanted else None
            is_product = module.algorithm == "lora" and not module.is_dora
            svd = decompose(module, tensors, weight, None if is_product else most(module.layer))
            norm = float(svd.s.norm())
            if not is_product:
                matrix = delta(module, tensors, weight)
                assert matrix is not None
                norm = float(matrix.norm())
            yield Whole(
                module=module,
                svd=svd,
                norm=norm,
                shape=weight_shape(module, weight),
                weight=None if weight is None else weight.float().flatten(1),
            )
