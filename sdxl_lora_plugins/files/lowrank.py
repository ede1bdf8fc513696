"""Low-rank decompositions of deltas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

_OVERSAMPLING: Final = 10
_ITERATIONS: Final = 4
_SEED: Final = 0


class Svd(NamedTuple):
    """A matrix as ``u diag(s) v``: [m, k], [k] descending, [k, n]."""

    u: Tensor
    s: Tensor
    v: Tensor

    def cut(self, rank: int) -> Svd:
        """Keep the largest singular values."""
        return Svd(self.u[:, :rank], self.s[:rank], self.v[:rank])

    def factors(self) -> tuple[Tensor, Tensor]:
        """Give ``up`` [m, k] and ``down`` [k, n] of equal size, whose product is the matrix.

        Halves of the singular values on either side keep both in the range of fp16.
        """
        root = self.s.sqrt()
        return self.u * root, root[:, None] * self.v


def of_product(up: Tensor, down: Tensor) -> Svd:
    """Decompose ``up @ down`` exactly without making it: [m, r] and [r, n] through their QR."""
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    u, s, v = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    return Svd(q_up @ u, s, v @ q_down.mT)


def of_matrix(matrix: Tensor, rank: int | None = None) -> Svd:
    """Decompose a matrix [m, n]: whole, or its ``rank`` largest singular values.

    With a rank far below the sides this is the randomized range finder of Halko et al. 2011
    (algorithms 4.4 and 5.1) with four power iterations and ten extra directions: its error is
    within 1 % of the best one of that rank even where singular values hardly fall. The same matrix
    always gives the same result.
    """
    if rank is None or 4 * (rank + _OVERSAMPLING) >= min(matrix.shape):
        whole = Svd(*torch.linalg.svd(matrix, full_matrices=False))
        return whole if rank is None else whole.cut(rank)
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(matrix.shape[1], rank + _OVERSAMPLING, generator=generator)
    basis = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return Svd(basis @ u, s, v).cut(rank)
