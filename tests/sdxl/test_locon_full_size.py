"""Networks with convolutions and with blocks on the full-size SDXL, on the meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from sdxl_lora_plugins.model import SDXL
from sdxl_lora_plugins.networks import Locon, Lokr, Lora

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from sdxl_train.assembly import Assembly


def shapes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(
    "network",
    [
        Lora(network_dim=4, conv_dim=4),
        Locon(network_dim=4),
        Lora(network_dim=4, conv_block_dims=[4] * 23),
    ],
    ids=["lora conv_dim=4", "locon", "lora conv_block_dims"],
)
def test_keys_with_convolutions_equal_the_golden_ones(
    network: Lora, attach_full_size: Callable[..., Assembly], golden: Callable[[str], Any]
) -> None:
    state = attach_full_size(network).adapter.state_dict()
    expected = golden("keys_lora_dim4_conv4")
    assert shapes(state) == {name: entry["shape"] for name, entry in expected.items()}
    alphas = {name: t.item() for name, t in state.items() if name.endswith(".alpha")}
    assert alphas == {n: entry["value"] for n, entry in expected.items() if n.endswith(".alpha")}


def test_convolutions_make_788_modules_of_722(attach_full_size: Callable[..., Assembly]) -> None:
    assert attach_full_size(Lora(conv_dim=4)).parts["unet"].modules == 788
    assert attach_full_size(Locon(conv_dim=0)).parts["unet"].modules == 722


def test_block_index_of_every_module_equals_the_golden_one(
    attach_full_size: Callable[..., Assembly], golden: Callable[[str], Any]
) -> None:
    indices = golden("block_dims")["block_index"]
    found = {
        f"{part.prefix}_{part.file_names[path]}": SDXL.blocks.index(block)
        for part in attach_full_size(Lora()).model.parts
        for block, paths in part.blocks.items()
        for path in paths
    }
    assert {name: found.get(name) for name in indices} == indices


@pytest.mark.parametrize(
    "case",
    [
        "dims",
        "dims_alphas",
        "dims_alphas_conv",
        "dims_convdim",
        "dims_some_zero",
        "lr_zero_blocks",
    ],
)
def test_ranks_and_alphas_by_block_equal_the_golden_ones(
    case: str, attach_full_size: Callable[..., Assembly], golden: Callable[[str], Any]
) -> None:
    entry = golden("block_dims")[case]
    args: dict[str, Any] = dict(entry["args"])
    for name, value in args.items():
        if not name.endswith("_lr_weight"):
            numbers = [int(item) for item in value.split(",")]
            args[name] = numbers if "," in value else numbers[0]
    network = Lora(network_dim=4, network_alpha=1, **args)
    layers = cast("Any", attach_full_size(network).adapter).layers
    found = {
        name: {"dim": layer.rank, "alpha": layer.alpha, "scale": layer.scale}
        for name, layer in layers.items()
    }
    assert found == entry["modules"]


def test_specific_loraplus_ratio_overrides_the_common_one(
    attach_full_size: Callable[..., Assembly],
) -> None:
    network = Lora(loraplus_lr_ratio=16, loraplus_text_encoder_lr_ratio=2, mid_lr_weight="1,.5,0")
    rates = {group["name"]: group["lr"] for group in attach_full_size(network, 1e-3).groups}
    assert rates["textencoder plus"] == pytest.approx(2e-3)
    assert rates["unet_block5 plus"] == pytest.approx(16e-3)
    assert rates["unet_block11"] == pytest.approx(5e-4)
    assert rates["unet_block11 plus"] == pytest.approx(8e-3)
    everything = attach_full_size(Lora(loraplus_lr_ratio=16), 1e-3).groups
    assert [(group["name"], group["lr"]) for group in everything] == [
        ("unet", 1e-3),
        ("unet plus", 16e-3),
        ("textencoder", 1e-3),
        ("textencoder plus", 16e-3),
    ]


def test_lokr_has_the_keys_shapes_and_alphas_of_lycoris(
    attach_full_size: Callable[..., Assembly], golden: Callable[[str], Any]
) -> None:
    state = attach_full_size(Lokr(network_dim=4)).adapter.state_dict()
    expected = golden("keys_lycoris_lokr_full")
    assert shapes(state) == {name: entry["shape"] for name, entry in expected.items()}
    assert {t.item() for name, t in state.items() if name.endswith(".alpha")} == {4.0}
