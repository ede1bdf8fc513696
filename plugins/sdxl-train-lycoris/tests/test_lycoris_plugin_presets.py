"""Presets of one's own, options by block, norms and rates; all algorithms in one network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from sdxl_train import UserError
from sdxl_train_lycoris.networks import Kohya, Lora

if TYPE_CHECKING:
    from pathlib import Path

    from sdxl_train import Adapter, LoadedModel
    from sdxl_train.testing import TinyModel, TrainTiny

EVERYTHING = """
enable_conv = true
unet_target_module = ["ResnetBlock2D"]
unet_target_name = [
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"
]
text_encoder_target_module = ["CLIPMLP"]
exclude_name = ["output_blocks.8"]

[module_algo_map.ResnetBlock2D]
algo = "locon"
dim = 1
alpha = 0.5

[name_algo_map]
to_q = { algo = "loha", dim = 2 }
to_k = { algo = "lokr", factor = 4, dim = 1 }
to_v = { algo = "dylora", dim = 2, block_size = 1 }
"to_out.0" = { algo = "glora" }
"ff.net.0.proj" = { algo = "ia3" }
"ff.net.2" = { algo = "diag-oft", constraint = 0.01 }
proj_in = { algo = "boft", dim = 8, rescaled = true }
proj_out = { algo = "full" }
"""
MARKS = {
    "to_q": "hada_w1_a",
    "to_k": "lokr_w1",
    "to_v": "lora_down.weight",
    "to_out_0": "a1.weight",
    "ff_net_0_proj": "on_input",
    "ff_net_2": "oft_blocks",
    "proj_in": "rescale",
    "proj_out": "diff",
}


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> LoadedModel:
    """A tiny SDXL; networks are taken off it again."""
    return tiny_model.load()


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A preset in which every algorithm has layers."""
    path = tmp_path_factory.mktemp("preset") / "everything.toml"
    path.write_text(EVERYTHING)
    return str(path)


def attach(model: LoadedModel, **options: Any) -> Adapter:
    torch.manual_seed(0)
    network = Kohya(**{"network_dim": 2, **options})
    assert not list(network.faults())
    adapter = network.build(model)
    adapter.detach()
    return adapter


def test_preset_file_gives_layers_algorithms_of_their_own(
    model: LoadedModel, everything: str
) -> None:
    state = attach(model, preset=everything, train_norm=True, network_alpha=3.0).state_dict()
    for suffix, mark in MARKS.items():
        layers = {key.partition(".")[0] for key in state}
        found = [layer for layer in layers if layer.endswith(suffix) and "unet" in layer]
        assert found
        assert all(f"{layer}.{mark}" in state for layer in found)
    resnet = "lora_unet_input_blocks_1_0_in_layers_2"
    assert state[f"{resnet}.lora_down.weight"].shape[0] == 1
    assert state[f"{resnet}.alpha"] == 0.5
    mlp = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    assert state[f"{mlp}.lora_down.weight"].shape[0] == 2
    assert state[f"{mlp}.alpha"] == 3.0
    assert "lora_unet_input_blocks_1_0_in_layers_0.w_norm" in state
    assert not any("output_blocks_8" in key or "self_attn" in key for key in state)


def test_names_that_hit_nothing_are_told(
    model: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "idle.toml"
    path.write_text("unet_target_name = ['to_k', 'conv_in']\nunet_target_module = ['DiTBlock']")
    attach(model, preset=str(path))
    assert "preset: nothing in the U-Net is DiTBlock, conv_in" in caplog.text


def test_every_algorithm_resumes_exactly(
    train_tiny: TrainTiny, everything: str, tmp_path: Path
) -> None:
    network: dict[str, Any] = {
        "network_module": "lycoris.kohya",
        "network_args": {
            "preset": everything,
            "train_norm": True,
            "module_dropout": 0.1,
            "rank_dropout": 0.1,
        },
        "network_dropout": 0.1,
        "mixed_precision": "bf16",
        "seed": 3,
    }
    whole = train_tiny(max_train_steps=2, **network)
    first = train_tiny(max_train_steps=1, save_state=True, **network)
    (state,) = first.folder.rglob("*-state")
    # What a preset says is compared, not where it lies and how it is laid out.
    moved, other = tmp_path / "moved.toml", tmp_path / "other.toml"
    moved.write_text(f"# moved\n{EVERYTHING}")
    other.write_text(EVERYTHING.replace("alpha = 0.5", "alpha = 1.0"))
    network["network_args"]["preset"] = str(other)
    with pytest.raises(UserError, match=r"network_args\.preset.* is a file of hash"):
        train_tiny(max_train_steps=2, resume=str(state), **network)
    network["network_args"]["preset"] = str(moved)
    second = train_tiny(max_train_steps=2, resume=str(state), **network)
    assert whole.tensors.keys() == second.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name


@pytest.mark.parametrize("count", [23, 25])
def test_ranks_by_block_are_those_of_the_list(model: LoadedModel, count: int) -> None:
    # SDXL: 5 is input_blocks.4, 11 middle_block.1; SD 1.x: 4 and 12.
    ranks, alphas = [1] * count, [1.0] * count
    first, middle = (5, 11) if count == 23 else (4, 12)
    ranks[first], ranks[middle], alphas[middle] = 0, 3, 6.0
    network = Lora(preset="attn-mlp", network_dim=2, block_dims=ranks, block_alphas=alphas)
    adapter = network.build(model)
    adapter.detach()
    state = adapter.state_dict()
    assert not any("input_blocks_4_" in key for key in state)
    key = "lora_unet_middle_block_1_proj_in"
    assert state[f"{key}.lora_down.weight"].shape[0] == 3
    assert state[f"{key}.alpha"] == 6.0
    assert state["lora_unet_input_blocks_5_1_proj_in.lora_down.weight"].shape[0] == 1
    assert state["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"].shape[0] == 2


def test_options_by_block_need_the_unet(tiny_model: TinyModel) -> None:
    model = tiny_model.load("meta", network_train_text_encoder_only=True)
    with pytest.raises(UserError, match="is about the U-Net, and no part of that trains"):
        Lora(block_dims="middle=4").build(model)


def test_loraplus_has_groups_of_its_own(model: LoadedModel) -> None:
    groups = attach(model, loraplus_lr_ratio=4.0, loraplus_unet_lr_ratio=16.0).groups()
    assert [(group.part, group.name, group.lr_factor) for group in groups] == [
        ("unet", "unet", 1.0),
        ("unet", "unet plus", 16.0),
        ("te1", "textencoder", 1.0),
        ("te1", "textencoder plus", 4.0),
        ("te2", "textencoder", 1.0),
        ("te2", "textencoder plus", 4.0),
    ]
    counts = [len(group.parameters) for group in groups]
    assert counts[::2] == counts[1::2]


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr", "dylora", "glora", "ia3", "full"])
def test_norms_of_deltas_are_limited(model: LoadedModel, algo: str) -> None:
    options = {"block_size": 2} if algo == "dylora" else {}
    adapter: Any = attach(
        model, algo=algo, scale_weight_norms=0.5, preset="unet-transformer-only", **options
    )
    with torch.no_grad():
        for group in adapter.groups():
            for parameter in group.parameters:
                parameter.add_(0.3 * torch.randn_like(parameter))
    for layer in adapter.modules():
        layer.eval()
    with torch.no_grad():
        before = torch.stack([layer.norm() for layer in adapter.modules()])
        metrics = adapter.limit_weights()
        after = torch.stack([layer.norm() for layer in adapter.modules()])
    assert (before > 0.5).any()
    torch.testing.assert_close(after, before.clamp(max=0.5), rtol=1e-4, atol=1e-6)
    assert metrics["max_norm/keys_scaled"] == (before > 0.5).sum()


def test_boft_names_the_rank_that_it_needs(tiny_model: TinyModel) -> None:
    model = tiny_model.load("meta")
    # 24 outputs of text encoder 2 are 2^3 * 3.
    with pytest.raises(UserError, match="4 is too small for the 24 outputs") as refused:
        Kohya(algo="boft", network_dim=4).build(model)
    assert "set it to 6 or more" in str(refused.value)


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr", "dylora", "glora"])
def test_ranks_are_taken_from_a_file(model: LoadedModel, algo: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"algo": algo}
    if algo in ("dylora", "lokr"):
        options |= {"block_size": 1} if algo == "dylora" else {"factor": 4}
    made = attach(model, block_dims="middle=3", network_dim=1, preset="attn-mlp", **options)
    state = {k: tensor.contiguous() for k, tensor in made.state_dict().items() if "te2" not in k}
    save_file(state, tmp_path / "some.safetensors")
    options["network_weights"] = tmp_path / "some.safetensors"
    taken = attach(model, dim_from_weights=True, **options)
    assert {key: tensor.shape for key, tensor in taken.state_dict().items()} == {
        key: tensor.shape for key, tensor in state.items()
    }
    taken.load_state_dict(state)
