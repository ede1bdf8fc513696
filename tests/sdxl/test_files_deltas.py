"""Deltas of stored modules against the forward of LyCORIS's and peft's own modules."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save_file
from torch import Tensor, nn

from sdxl_lora_plugins.model import SDXL
from sdxl_train.ldm import NetworkFile
from sdxl_train.ldm.files.deltas import bias_delta, delta, factors

if TYPE_CHECKING:
    from pathlib import Path

NAME = "lora_unet_input_blocks_4_1_proj_in"
LINEAR = (24, 16)
CONV3 = (24, 16, 3, 3)
CONV1 = (24, 16, 1, 1)

CASES: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "lora": (LoConModule, LINEAR, {}),
    "lora-1x1": (LoConModule, CONV1, {}),
    "locon": (LoConModule, CONV3, {}),
    "locon-tucker": (LoConModule, CONV3, {"use_tucker": True}),
    "rs-lora": (LoConModule, LINEAR, {"rs_lora": True}),
    "dora-input": (LoConModule, LINEAR, {"weight_decompose": True, "wd_on_out": False}),
    "dora-output": (LoConModule, LINEAR, {"weight_decompose": True, "wd_on_out": True}),
    "dora-conv-input": (LoConModule, CONV3, {"weight_decompose": True, "wd_on_out": False}),
    "dora-conv-output": (LoConModule, CONV3, {"weight_decompose": True, "wd_on_out": True}),
    "loha": (LohaModule, LINEAR, {}),
    "loha-conv": (LohaModule, CONV3, {}),
    "loha-tucker": (LohaModule, CONV3, {"use_tucker": True}),
    "lokr": (LokrModule, LINEAR, {"factor": 4}),
    "lokr-both": (LokrModule, LINEAR, {"factor": 4, "decompose_both": True, "lora_dim": 1}),
    "lokr-whole": (LokrModule, LINEAR, {"full_matrix": True}),
    "lokr-conv": (LokrModule, CONV3, {"factor": 2}),
    "lokr-tucker": (LokrModule, CONV3, {"factor": 2, "use_tucker": True}),
    "lokr-dora": (LokrModule, LINEAR, {"factor": 4, "weight_decompose": True}),
    "full": (FullModule, LINEAR, {}),
    "full-conv": (FullModule, CONV3, {}),
    "ia3-output": (IA3Module, LINEAR, {}),
    "ia3-input": (IA3Module, LINEAR, {"train_on_input": True}),
    "ia3-conv": (IA3Module, CONV3, {}),
    "oft": (DiagOFTModule, LINEAR, {"lora_dim": 4}),
    "oft-constrained": (DiagOFTModule, LINEAR, {"lora_dim": 4, "constraint": 1e-3}),
    "oft-rescaled": (DiagOFTModule, CONV3, {"lora_dim": 4, "rescaled": True}),
    "boft": (ButterflyOFTModule, (32, 16), {"lora_dim": 4}),
    "boft-conv": (ButterflyOFTModule, (16, 8, 3, 3), {"lora_dim": 4, "rescaled": True}),
    "glora": (GLoRAModule, LINEAR, {}),
    "glora-conv": (GLoRAModule, CONV3, {}),
}


def random_module(
    kind: Any, shape: tuple[int, ...], options: dict[str, Any]
) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    """A layer with LyCORIS's module on it, every parameter random, and its own parameters."""
    torch.manual_seed(3)
    layer: nn.Module = nn.Linear(shape[1], shape[0])
    if len(shape) == 4:
        layer = nn.Conv2d(shape[1], shape[0], shape[2], padding=shape[2] // 2)
    # LyCORIS says on standard output and in the log what it decides.
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    plain = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    module = kind(NAME, layer, 1.0, **{"lora_dim": 3, "alpha": 1.5, **options})
    module.apply_to()
    module.eval()
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer, module, plain


def saved(module: Any, path: Path) -> Path:
    state = {f"{NAME}.{key}": tensor for key, tensor in module.state_dict().items()}
    save_file({key: tensor.detach().contiguous() for key, tensor in state.items()}, path)
    return path


def applied(layer: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, bias, padding=layer.padding)
    return F.linear(x, weight, bias)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_delta_is_what_lycoris_forward_adds(case: str, tmp_path: Path) -> None:
    kind, shape, options = CASES[case]
    layer, module, plain = random_module(kind, shape, options)
    weight, bias = plain["weight"], plain["bias"]
    x = torch.randn(2, shape[1], *(5,) * (len(shape) - 2))

    found = NetworkFile.open(saved(module, tmp_path / "network.safetensors"), SDXL)
    stored = found.modules[NAME]
    with found.weights() as read:
        tensors = read(stored)
    computed = delta(stored, tensors, weight)

    assert not list(found.faults())
    assert computed is not None
    of_bias = bias_delta(tensors)
    ours = applied(layer, weight + computed, bias if of_bias is None else bias + of_bias, x)
    theirs = layer(x)
    assert (theirs - applied(layer, weight, bias, x)).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", ["lora", "locon", "locon-tucker"])
@torch.no_grad()
def test_factors_multiply_to_the_delta(case: str, tmp_path: Path) -> None:
    kind, shape, options = CASES[case]
    _, module, _ = random_module(kind, shape, options)

    found = NetworkFile.open(saved(module, tmp_path / "network.safetensors"), SDXL)
    stored = found.modules[NAME]
    with found.weights() as read:
        tensors = read(stored)
    pair = factors(stored, tensors)

    assert pair is not None
    expected = delta(stored, tensors)
    assert expected is not None
    torch.testing.assert_close((pair[0] @ pair[1]).reshape(expected.shape), expected)
