"""Low-rank decompositions against torch's singular values."""

from __future__ import annotations

import torch

from sdxl_lora_plugins.files import lowrank


def test_a_product_is_decomposed_as_its_matrix_is() -> None:
    up, down = torch.randn(20, 6).double(), torch.randn(6, 30).double()

    u, s, v = lowrank.of_product(up, down)

    assert torch.allclose((u * s) @ v, up @ down)
    assert torch.allclose(s, torch.linalg.svdvals(up @ down)[:6])


def test_a_randomized_decomposition_errs_as_little_as_the_best_of_its_rank() -> None:
    torch.manual_seed(1)
    matrix = torch.randn(300, 200)

    up, down = lowrank.of_matrix(matrix, rank=8).factors()

    best = torch.linalg.svdvals(matrix)[8:].square().sum().sqrt()
    assert torch.linalg.matrix_norm(matrix - up @ down) < 1.01 * best
