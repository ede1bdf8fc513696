"""Options of networks: values for 23 blocks, factors of learning rates, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from sdxl_lora_plugins.model import SDXL
from sdxl_lora_plugins.networks import Locon, Lokr, Lora
from sdxl_lora_plugins.networks.lokr import split

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdxl_train import Network


def complaints(network: Network) -> dict[str, str]:
    model = SimpleNamespace(block_names=lambda: SDXL.blocks)
    config: Any = SimpleNamespace(place=lambda name: f"--{name}", model=model)
    return {problem.place: problem.message for problem in network.check(config)}


@pytest.mark.parametrize(
    "case", ["cosine", "linear+.25", "zeros", "short", "threshold", "only_mid"]
)
def test_factors_by_block_equal_the_golden_ones(case: str, golden: Callable[[str], Any]) -> None:
    entry = golden("block_dims")["block_lr_weight"][case]
    args = dict(entry["args"])
    if "block_lr_zero_threshold" in args:
        args["block_lr_zero_threshold"] = float(args["block_lr_zero_threshold"])
    network = Lora(**args)
    values = network.by_block(SDXL.blocks)
    assert [values.lr_factor(block) for block in SDXL.blocks] == pytest.approx(entry["out"])


def test_empty_factor_is_0_and_a_bare_number_is_the_first() -> None:
    network = Lora(down_lr_weight=cast("Any", "0.5"), up_lr_weight=cast("Any", ",2"))
    values = network.by_block(SDXL.blocks)
    factors = [values.lr_factor(block) for block in SDXL.blocks]
    assert factors[1:10] == [0.5, *[1.0] * 8]
    assert factors[13:22] == [0, 2, *[1.0] * 7]


@pytest.mark.parametrize("name", ["block_dims", "block_alphas", "conv_block_dims"])
def test_wrong_count_lists_the_23_blocks(name: str) -> None:
    network = Lora(**cast("Any", {"conv_dim": 2, name: [1, 2, 3]}))
    (message,) = complaints(network).values()
    assert message.startswith("3 values, expected 23, one for each of")
    assert len(SDXL.blocks) == 23
    assert all(block in message for block in SDXL.blocks)


@pytest.mark.parametrize(
    ("value", "message"),
    [("cosin", "nor one of sine, cosine"), ("1,x", "no list of numbers"), ("sine+x", "NUMBER")],
)
def test_wrong_factors_are_refused(value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(down_lr_weight=cast("Any", value))


def test_more_factors_than_blocks_are_refused() -> None:
    network = Lora(down_lr_weight=[1.0] * 10)
    assert complaints(network) == {"--network_args.down_lr_weight": "10 values for 9 blocks"}


def test_options_without_effect_are_refused() -> None:
    assert complaints(Lora(conv_alpha=1)) == {
        "--network_args.conv_alpha": "has no effect: no convolution is adapted"
    }
    assert list(complaints(Lora(block_lr_zero_threshold=0.1))) == [
        "--network_args.block_lr_zero_threshold"
    ]
    assert complaints(Lora(conv_dim=2, conv_alpha=1)) == complaints(Locon(conv_alpha=1)) == {}
    assert list(complaints(Lokr(factor=0))) == ["--network_args.factor"]
    both = Lokr(full_matrix=True, decompose_both=True)
    assert list(complaints(both)) == ["--network_args.decompose_both"]


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    # Values of its function; its own description has 12 and 30 for the factor 16 of 360.
    [
        (127, -1, (1, 127)),
        (250, -1, (10, 25)),
        (360, 4, (4, 90)),
        (360, 16, (15, 24)),
        (1024, -1, (32, 32)),
        (512, 64, (8, 64)),
    ],
)
def test_sizes_split_as_in_lycoris(size: int, factor: int, expected: tuple[int, int]) -> None:
    assert split(size, factor) == expected
