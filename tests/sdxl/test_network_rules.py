"""Which layers train, with what rank, alpha and rate: rules by name, named blocks, and limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from pydantic import ValidationError

from sdxl_lora_plugins.model import SDXL
from sdxl_lora_plugins.networks import Locon, Lokr, Lora
from sdxl_train import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from sdxl_lora_plugins.networks.adapter import LayerAdapter
    from sdxl_train.ldm.loaded import LoadedLdm


@pytest.fixture
def meta(tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]) -> Callable[..., LoadedLdm]:
    """Load the shapes of the tiny model, with options of the model."""
    return lambda **options: load_sdxl(tiny_file, "meta", **options)


def ranks(adapter: Any) -> dict[str, int]:
    return {name: layer.rank for name, layer in adapter.layers.items()}


def test_last_rule_that_matches_says_everything(meta: Callable[..., LoadedLdm]) -> None:
    plain = ranks(Lora(network_dim=4).build(meta()))
    rules = cast("Any", "attn dim=8 alpha=2; attn2.to_k dim=2; ff_net exclude; attn2.to_v alpha=3")
    adapter = cast("LayerAdapter", Lora(network_dim=4, rules=rules).build(meta()))
    assert plain.keys() - ranks(adapter).keys() == {name for name in plain if "ff_net" in name}
    for name, layer in adapter.layers.items():
        expected: tuple[int, float] = (4, 1.0)
        if "attn2_to_k" in name:
            expected = (2, 1.0)
        elif "attn2_to_v" in name:
            expected = (4, 3.0)
        elif "attn" in name:
            expected = (8, 2.0)
        assert (layer.rank, layer.alpha) == expected, name


def test_include_adapts_what_is_otherwise_left_out(meta: Callable[..., LoadedLdm]) -> None:
    rules = cast("Any", ["^lora exclude", "time_embed include dim=3", "in_layers include"])
    found = ranks(Lora(network_dim=4, rules=rules).build(meta(network_train_unet_only=True)))
    stem = {name for name in found if "time_embed" in name}
    assert stem == {"lora_unet_time_embed_0", "lora_unet_time_embed_2"}
    assert {found[name] for name in stem} == {3}
    assert {found[name] for name in found.keys() - stem} == {4}
    assert all("in_layers_2" in name for name in found.keys() - stem)


def test_rule_with_a_rate_makes_a_group_of_its_own(meta: Callable[..., LoadedLdm]) -> None:
    tables = cast("Any", [{"match": "attn1", "lr": 5e-5}, {"match": "ff_net_2", "lr": 0}])
    adapter = Lora(rules=tables, loraplus_lr_ratio=4, mid_lr_weight=[0.5, 0.5, 0.5]).build(
        meta(unet_lr=1e-3, text_encoder_lr=[2e-5])
    )
    groups = {group.name: (group.lr, group.lr_factor) for group in adapter.groups()}
    assert groups["unet_rule1"] == (5e-5, 1.0)
    assert groups["unet_rule1 plus"] == (5e-5, 4.0)
    assert groups["unet_block11"] == (1e-3, 0.5)
    assert groups["textencoder"] == (2e-5, 1.0)
    assert not any("ff_net_2" in name for name in adapter.state_dict())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("attn2 dims=8", "'dims=8' is not one of include, exclude, dim=N"),
        ("attn2", "says nothing"),
        ("attn2 dim=x", "'x' is not a whole number"),
        ("(attn2 dim=4", "no regular expression"),
        ("attn2 exclude dim=4", "exclude goes with nothing else"),
        ("attn2 include dim=0", "includes and leaves out"),
    ],
)
def test_wrong_rules_are_refused(rules: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Lora(rules=cast("Any", rules))
    assert message in str(caught.value)


def test_rule_that_matches_nothing_names_what_is_close(meta: Callable[..., LoadedLdm]) -> None:
    with pytest.raises(UserError) as caught:
        Lora(rules=cast("Any", "attn2; atn2_to_k dim=2".replace("attn2;", "attn2 dim=4;"))).build(
            meta()
        )
    assert "'atn2_to_k' matches no layer" in str(caught.value)
    assert "attn2_to_k" in str(caught.value)


def test_blocks_go_by_name_group_and_glob() -> None:
    network = Lora(
        block_dims=cast("Any", "input_4=8,middle=16,output_*=4,output_blocks.2=2"),
        block_alphas=cast("Any", {"middle_block.1": 3.5}),
        network_dim=32,
        network_alpha=7,
    )
    values = network.by_block(SDXL.blocks)
    by_name = {name: network.rank_and_alpha(name, values, has_kernel=False) for name in SDXL.blocks}
    assert by_name["input_4"] == (8, 7)
    assert by_name["input_5"] == (32, 7)
    assert by_name["middle_0"] == (16, 7)
    assert by_name["middle_1"] == (16, 3.5)
    assert by_name["output_2"] == (2, 7)
    assert {by_name[f"output_{i}"] for i in (0, 1, 3, 4, 5, 6, 7, 8)} == {(4, 7)}
    assert network.rank_and_alpha(None, values, has_kernel=False) == (32, 7)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("inputs_4=8", "close are input_4"),
        ("input_9=8", "close are input_"),
        ("zzz*=8", "they are time_embed, input_0"),
        ("input_4=8,9", "'9' has no NAME="),
        ("input_4=-1", "-1 is not a whole number >= 0"),
        ("input_4=1.5", "1.5 is not a whole number"),
        ("1,2", "2 values, expected 23"),
    ],
)
def test_wrong_blocks_are_refused(value: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is a parameter
        Lora(block_dims=cast("Any", value)).by_block(SDXL.blocks)
    assert message in str(caught.value)


def test_options_of_a_part_that_does_not_train_are_refused(
    meta: Callable[..., LoadedLdm],
) -> None:
    text_only = meta(network_train_text_encoder_only=True)
    for options in ({"block_dims": [4] * 23}, {"up_lr_weight": "cosine"}):
        with pytest.raises(UserError, match="is about the U-Net"):
            Lora(**cast("Any", options)).build(text_only)


def test_loraplus_ratios_of_a_part_that_does_not_train_are_warned_of(
    meta: Callable[..., LoadedLdm], caplog: pytest.LogCaptureFixture
) -> None:
    Lora(loraplus_text_encoder_lr_ratio=4).build(meta(network_train_unet_only=True))
    Lora(loraplus_unet_lr_ratio=4).build(meta(network_train_text_encoder_only=True))
    for name in ("loraplus_text_encoder_lr_ratio", "loraplus_unet_lr_ratio"):
        assert f"{name} has no effect: no part of that trains" in caplog.text


NORMED: dict[str, tuple[Any, dict[str, Any]]] = {
    "locon": (Locon, {"network_dim": 3, "network_alpha": 2, "rs_lora": True}),
    "lokr": (Lokr, {"network_dim": 2, "decompose_both": True, "factor": 4}),
}


@pytest.mark.parametrize("name", list(NORMED))
def test_norms_of_deltas_stay_below_the_limit(
    name: str, tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    kind, options = NORMED[name]
    model = load_sdxl(tiny_file, network_train_unet_only=True)
    limit = 0.05
    adapter = kind(scale_weight_norms=limit, **options).build(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for index, layer in enumerate(adapter.layers.values()):
            for parameter in layer.parameters():
                size = 0.02 if index % 3 else 0.3
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    before = deltas(adapter.state_dict())
    metrics = adapter.limit_weights()
    after = deltas(adapter.state_dict())
    scaled = 0
    for layer_name, old in before.items():
        # sd-scripts: D * min(|D|, M) / |D|, where |D| counts as at least M / 2.
        norm = max(float(old.norm()), limit / 2)
        expected = old * min(norm, limit) / norm
        scaled += norm > limit
        torch.testing.assert_close(after[layer_name], expected, rtol=1e-4, atol=1e-8)
    assert 0 < scaled < len(before)
    assert int(metrics["max_norm/keys_scaled"]) == scaled
    norms = torch.stack([delta.norm() for delta in after.values()])
    assert float(metrics["max_norm/max_key_norm"]) == pytest.approx(float(norms.max()), rel=1e-4)
    assert float(metrics["max_norm/avg_key_norm"]) == pytest.approx(float(norms.mean()), rel=1e-4)


def deltas(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the delta weight of each layer, flat, from the tensors of a file."""
    names = {key.partition(".")[0] for key in state}
    return {name: _delta({k.partition(".")[2]: t for k, t in state.items()
                          if k.partition(".")[0] == name}) for name in names}  # fmt: skip


def _delta(keys: dict[str, Tensor]) -> Tensor:
    if "lora_up.weight" in keys:
        up, down = keys["lora_up.weight"].flatten(1), keys["lora_down.weight"].flatten(1)
        return up @ down * keys["alpha"] / len(down)
    first = keys.get("lokr_w1")
    second = keys.get("lokr_w2")
    scale = torch.tensor(1.0)
    if first is None:
        first, scale = keys["lokr_w1_a"] @ keys["lokr_w1_b"], keys["alpha"] / len(keys["lokr_w1_b"])
    if second is None:
        second = keys["lokr_w2_a"] @ keys["lokr_w2_b"]
        scale = keys["alpha"] / len(keys["lokr_w2_b"])
    return torch.kron(first, second.flatten(1)) * scale


def test_rank_options_are_refused_with_a_full_matrix() -> None:
    from types import SimpleNamespace

    model = SimpleNamespace(block_names=lambda: SDXL.blocks)
    config: Any = SimpleNamespace(place=lambda name: f"--{name}", model=model)
    network = Lokr(full_matrix=True, network_dim=8, conv_dim=0, block_dims=[4] * 23)
    assert {problem.place for problem in network.check(config)} == {
        "--network_dim",
        "--network_args.block_dims",
    }
    assert not list(Lokr(full_matrix=True, block_dims=cast("Any", "input_*=0")).check(config))
