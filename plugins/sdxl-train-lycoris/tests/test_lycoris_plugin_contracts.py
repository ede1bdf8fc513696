"""Every algorithm keeps the contract of networks; formulas of files that the kit does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdxl_train.testing import NetworkContract
from sdxl_train_lycoris.networks import Boft, DiagOft, Dylora, Full, Glora, Ia3

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

UNET = {"network_train_unet_only": True}


def block_diagonal(blocks: Tensor) -> Tensor:
    """Give the matrix with blocks [n, b, b] on its diagonal."""
    count, size, _ = blocks.shape
    whole = blocks.new_zeros(count, size, count, size)
    whole[range(count), :, range(count)] = blocks
    return whole.flatten(2).flatten(0, 1)


class TestDylora(NetworkContract):
    component = Dylora
    options = {"block_size": 1, "preset": "unet-convblock-only"}
    model_options = UNET
    loads_in_diffusers = True


class TestGlora(NetworkContract):
    component = Glora
    options = {"preset": "unet-convblock-only"}
    model_options = UNET

    def merged_weight(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """W + alpha/r (W a1 a2 + b1 b2): W's inputs are mixed, alike at each place of a kernel."""
        a1, a2, b1 = (tensors[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1"))
        of_weight = torch.tensordot(weight.movedim(1, -1), a1 @ a2, dims=1).movedim(-1, 1)
        beside = torch.tensordot(b1, tensors["b2.weight"], dims=1).reshape(weight.shape)
        merged: Tensor = weight + tensors["alpha"] / len(a2) * (of_weight + beside)
        return merged


class TestIa3(NetworkContract):
    component = Ia3
    options = {"preset": "ia3"}
    idle = ("network_dim", "network_alpha")
    has_alpha = False

    def merged_weight(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """(1 + w) W by output, W (1 + w) by input."""
        factor = 1 + tensors["weight"].flatten()
        if tensors["on_input"]:
            return weight * factor
        return (weight.T * factor).T


class RotationContract(NetworkContract):
    # The sizes of the tiny model have the same blocks for ranks 2 and 3.
    idle = ("network_alpha", "network_dim")
    model_options = UNET

    def rotations(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(1 + Q)(1 - Q)^-1 with Q = B - B', solved and not inverted."""
        assert tensors["alpha"] == 0
        blocks = tensors["oft_blocks"].double()
        skew, one = blocks - blocks.mT, torch.eye(blocks.shape[-1], dtype=torch.double)
        rotations: Tensor = torch.linalg.solve(one - skew, one + skew, left=False)
        return rotations

    def rescaled(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Multiply each output by its factor."""
        return weight.float() * tensors["rescale"] if "rescale" in tensors else weight.float()


class TestDiagOft(RotationContract):
    component = DiagOft
    options = {"rescaled": True, "constraint": 0.01, "preset": "unet-convblock-only"}

    def merged_weight(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """R' W with R of blocks on the diagonal."""
        whole = block_diagonal(self.rotations(tensors))
        turned = (whole.T @ weight.double().flatten(1)).reshape(weight.shape)
        return self.rescaled(turned, tensors)


class TestBoft(RotationContract):
    component = Boft
    options = {"network_dim": 8, "preset": "unet-transformer-only"}

    def merged_weight(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Stage i rotates outputs that lie 2^i half blocks apart (Liu et al. 2024, figure 3)."""
        turned = weight.double().flatten(1)
        for stage, blocks in enumerate(self.rotations(tensors)):
            stride = 2**stage * (blocks.shape[-1] // 2)
            order = [
                start + row + half * stride
                for start in range(0, len(turned), 2 * stride)
                for row in range(stride)
                for half in (0, 1)
            ]
            turned[order] = block_diagonal(blocks) @ turned[order]
        return self.rescaled(turned.reshape(weight.shape), tensors)


class TestFullWithNorms(NetworkContract):
    component = Full
    options = {"train_norm": True, "preset": "unet-convblock-only"}
    idle = ("network_dim", "network_alpha")
    has_alpha = False
    model_options = UNET

    def merged_weight(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """W + D, of norms too."""
        return weight + (tensors["diff"] if "diff" in tensors else tensors["w_norm"])

    def merged_bias(self, bias: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The same for the bias."""
        return bias + (tensors["diff_b"] if "diff_b" in tensors else tensors["b_norm"])
