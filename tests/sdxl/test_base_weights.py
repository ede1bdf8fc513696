"""Networks merged into the base model, and ranks taken from a file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_lora_plugins.fp8 import Fp8Format
from sdxl_lora_plugins.networks import Locon, Lokr, Lora
from sdxl_train import UserError
from sdxl_train.testing.network_files import merged_weight

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from sdxl_train.ldm.loaded import LoadedLdm

NETWORKS = {
    "lora": Lora(network_dim=3, network_alpha=2.0),
    "dora": Lora(network_dim=2, network_alpha=2.0, dora_wd=True),
    "locon": Locon(network_dim=2, conv_dim=1, rs_lora=True),
    "lokr": Lokr(network_dim=1, network_alpha=3.0, factor=4),
}


@pytest.fixture
def model(tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]) -> LoadedLdm:
    """A model of one's own: merging changes it."""
    return load_sdxl(tiny_file)


@pytest.fixture(scope="module")
def files(
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A file of each kind of network, with random factors."""
    folder, model = tmp_path_factory.mktemp("networks"), load_sdxl(tiny_file)
    for name, network in NETWORKS.items():
        torch.manual_seed(len(name))
        adapter = network.build(model)
        with torch.no_grad():
            for group in adapter.groups():
                for parameter in group.parameters:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        save_file(adapter.state_dict(), folder / f"{name}.safetensors")
        adapter.detach()
    # LoHa (Hyeon-Woo et al. 2022) of one layer, as LyCORIS writes it.
    layer = "lora_unet_middle_block_1_proj_in"
    out, into = layers(model)[layer].weight.shape
    shapes = {"hada_w1_a": (out, 2), "hada_w1_b": (2, into)}
    shapes |= {"hada_w2_a": (out, 2), "hada_w2_b": (2, into)}
    state = {f"{layer}.{key}": torch.randn(shape) for key, shape in shapes.items()}
    save_file({**state, f"{layer}.alpha": torch.tensor(2.0)}, folder / "loha.safetensors")
    return {name: folder / f"{name}.safetensors" for name in (*NETWORKS, "loha")}


def layers(model: LoadedLdm) -> dict[str, Any]:
    return {
        f"{part.prefix}_{name}": part.module.get_submodule(path)
        for part in (*model.parts, *model.frozen_parts)
        for path, name in part.file_names.items()
    }


def weights(model: LoadedLdm) -> dict[str, Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in layers(model).items()}


def by_layer(path: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        name, _, kind = key.partition(".")
        found.setdefault(name, {})[kind] = tensor
    return found


def expected(before: dict[str, Tensor], networks: list[tuple[Path, float]]) -> dict[str, Tensor]:
    """W + sum of m (W' - W), where W' is the weight with one file merged."""
    merged = dict(before)
    for path, multiplier in networks:
        for name, tensors in by_layer(path).items():
            difference = merged_weight(before[name], tensors) - before[name]
            merged[name] = merged[name] + multiplier * difference
    return merged


@pytest.mark.parametrize("kind", [*NETWORKS, "loha"])
def test_file_of_each_kind_is_merged(model: LoadedLdm, files: dict[str, Path], kind: str) -> None:
    before = weights(model)
    model.merge_networks([(files[kind], 0.75)])
    after, target = weights(model), expected(before, [(files[kind], 0.75)])
    assert any(not torch.equal(after[name], before[name]) for name in before)
    for name in before:
        torch.testing.assert_close(after[name], target[name], rtol=1e-5, atol=1e-6)


def test_several_files_are_summed_in_any_order(
    load_sdxl: Callable[..., LoadedLdm], tiny_file: Path, files: dict[str, Path]
) -> None:
    networks = [(files["lora"], 0.5), (files["dora"], 1.0), (files["lokr"], -1.0)]
    first, second = load_sdxl(tiny_file), load_sdxl(tiny_file)
    target = expected(weights(first), networks)
    first.merge_networks(networks)
    second.merge_networks(networks[::-1])
    one, two = weights(first), weights(second)
    for name in target:
        torch.testing.assert_close(one[name], target[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-7)
    recorded = json.loads(first.metadata()["ss_base_weights"])
    assert [(item["name"], item["multiplier"]) for item in recorded] == [
        ("lora.safetensors", 0.5), ("dora.safetensors", 1.0), ("lokr.safetensors", -1.0)
    ]  # fmt: skip


def test_weights_in_8_bits_are_stored_anew(
    load_sdxl: Callable[..., LoadedLdm], tiny_file: Path, files: dict[str, Path]
) -> None:
    plain, coarse = load_sdxl(tiny_file), load_sdxl(tiny_file)
    coarse.quantize(Fp8Format(), denoiser_only=False)
    before = weights(coarse)
    plain.merge_networks([(files["lora"], 1.0)])
    coarse.merge_networks([(files["lora"], 1.0)])
    exact, stored = weights(plain), weights(coarse)
    name = "lora_unet_middle_block_1_proj_in"
    # e4m3 rounds to 1/16 of a value, twice here; what it rounds off is no larger than that.
    error = (stored[name] - exact[name]).abs().max()
    assert error < exact[name].abs().max() / 8
    assert (before[name] - exact[name]).abs().max() > 2 * error


def test_norms_and_biases_of_a_file_are_merged(model: LoadedLdm, tmp_path: Path) -> None:
    found = layers(model)
    norm, linear = "lora_unet_middle_block_1_norm", "lora_unet_middle_block_1_proj_in"
    before = {
        name: (found[name].weight.clone(), found[name].bias.clone()) for name in (norm, linear)
    }
    state = {
        f"{norm}.w_norm": torch.randn(found[norm].weight.shape),
        f"{norm}.b_norm": torch.randn(found[norm].bias.shape),
        f"{linear}.diff": torch.randn(found[linear].weight.shape),
        f"{linear}.diff_b": torch.randn(found[linear].bias.shape),
    }
    save_file(state, tmp_path / "norms.safetensors")
    model.merge_networks([(tmp_path / "norms.safetensors", 0.5)])
    for name, kinds in ((norm, ("w_norm", "b_norm")), (linear, ("diff", "diff_b"))):
        for kind, old, new in zip(
            kinds, before[name], (found[name].weight, found[name].bias), strict=True
        ):
            torch.testing.assert_close(new, old + 0.5 * state[f"{name}.{kind}"])


def test_misfits_are_named(
    load_sdxl: Callable[..., LoadedLdm], tiny_file: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    planned = load_sdxl(tiny_file, device="meta")
    planned.merge_networks([(path, 1.0) for path in files.values()])
    layer = "lora_unet_middle_block_1_proj_in"
    wide = {f"{layer}.lora_down.weight": torch.ones(2, 999), f"{layer}.alpha": torch.ones(())}
    save_file({**wide, f"{layer}.lora_up.weight": torch.ones(7, 2)}, tmp_path / "wide.safetensors")
    down = "lora_unet_input_blocks_4_1_transformer_blocks_9_ff_net_2"
    deep = {
        f"{down}.lora_down.weight": torch.ones(2, 8),
        f"{down}.lora_up.weight": torch.ones(8, 2),
    }
    save_file(deep, tmp_path / "deep.safetensors")
    with pytest.raises(UserError) as refused:
        planned.merge_networks(
            [(tmp_path / "wide.safetensors", 1.0), (tmp_path / "deep.safetensors", 1.0)]
        )
    assert "is for a weight [7, 999]" in str(refused.value)
    assert f"the base model has no 1 layer: {down}" in str(refused.value)


@pytest.mark.parametrize("kind", ["lora", "locon", "lokr"])
def test_ranks_are_taken_from_a_file(
    model: LoadedLdm, files: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    # Some layers only, two of them with ranks of their own.
    state = {k: t for k, t in load_file(files[kind]).items() if "_te1_" not in k}
    if kind == "lora":
        name = "lora_unet_middle_block_1_proj_in"
        down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
        state[f"{name}.lora_down.weight"] = torch.cat([down, down])
        state[f"{name}.lora_up.weight"] = torch.cat([up, up], dim=1)
        state[f"{name}.alpha"] = torch.tensor(1.5)
    save_file(state, tmp_path / "some.safetensors")
    options = {"network_weights": tmp_path / "some.safetensors", "dim_from_weights": True}
    if kind == "lokr":
        adapter = Lokr(factor=4, **options).build(model)
    else:
        adapter = Lora(**options).build(model)
    own = adapter.state_dict()
    assert {key: tensor.shape for key, tensor in own.items()} == {
        key: tensor.shape for key, tensor in state.items()
    }
    for key, tensor in own.items():
        if key.endswith(".alpha"):
            torch.testing.assert_close(tensor, state[key])
    wanted = "Dynamic" if kind == "lora" else {"locon": "Dynamic", "lokr": "1"}[kind]
    assert adapter.metadata()["ss_network_dim"] == wanted
    adapter.load_state_dict(state)
