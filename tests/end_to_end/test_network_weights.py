"""Beginning with the weights of a file."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_train import UserError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("network", ["networks.lora", "lokr"])
def test_run_begins_with_the_weights_of_a_file(train_lora: Any, network: str) -> None:
    first = train_lora(network_module=network, max_train_steps=2)
    second = train_lora(
        network_module=network, max_train_steps=1, network_weights=str(first.path), seed=5
    )
    assert second.initial.keys() == first.tensors.keys()
    for name, tensor in second.initial.items():
        torch.testing.assert_close(tensor, first.tensors[name], rtol=1e-6, atol=0)


def test_weights_of_another_rank_or_network_are_refused(
    train_lora: Any, options: Any, tmp_path: Path
) -> None:
    import sdxl_train

    trained = train_lora(max_train_steps=1)
    for changes, message in (
        ({"network_dim": 8}, "tensors have another shape"),
        ({"network_alpha": 4.0}, "settings differ"),
        ({"network_module": "lokr"}, "is LoRA, and this run trains LoKr"),
    ):
        with pytest.raises(UserError, match=message):
            sdxl_train.plan(options(network_weights=str(trained.path), **changes))
    state = load_file(trained.path)
    some = {name: t for name, t in state.items() if "_te1_" not in name}
    save_file(some, tmp_path / "some.safetensors")
    sdxl_train.plan(options(network_weights=str(tmp_path / "some.safetensors")))
    with pytest.raises(UserError):
        sdxl_train.plan(options(network_weights=str(tmp_path / "absent.safetensors")))


def test_base_weights_train_as_on_a_merged_checkpoint(
    train_lora: Any, options: Any, tiny_file: Path, tmp_path: Path
) -> None:
    import sdxl_train
    from sdxl_lora_plugins.commands.merge import Merge

    first = train_lora(max_train_steps=1, learning_rate=0.05)
    second = train_lora(network_module="locon", max_train_steps=1, learning_rate=0.05, seed=1)
    files, merged = [str(first.path), str(second.path)], tmp_path / "merged.safetensors"
    merge = Merge(
        models=[first.path, second.path], ratios=[0.5, 1.0], sd_model=tiny_file, save_to=merged
    )
    assert merge.run() == 0
    on_file = train_lora(max_train_steps=2, pretrained_model_name_or_path=str(merged))
    multiplied = {"base_weights": files, "base_weights_multiplier": [0.5]}
    live = train_lora(max_train_steps=2, save_state=True, **multiplied)
    plain = train_lora(max_train_steps=2)
    assert live.tensors.keys() == on_file.tensors.keys()
    for name, tensor in on_file.tensors.items():
        torch.testing.assert_close(live.tensors[name], tensor, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(t, live.tensors[n]) for n, t in plain.tensors.items())
    recorded = json.loads(live.metadata["ss_base_weights"])
    assert [(item["name"], item["multiplier"]) for item in recorded] == [
        (first.path.name, 0.5),
        (second.path.name, 1.0),
    ]

    again = {"output_dir": str(live.folder), "resume": "latest", "max_train_steps": 3}
    with pytest.raises(UserError, match="resume with the base model of the state"):
        train_lora(**again, **{**multiplied, "base_weights": files[::-1]})
    with pytest.raises(UserError, match="base_weights_multiplier"):
        sdxl_train.plan(options(**again, **multiplied | {"base_weights_multiplier": [1.0]}))
    moved = [shutil.copy(path, tmp_path / f"moved{i}.safetensors") for i, path in enumerate(files)]
    resumed = train_lora(**again, **{**multiplied, "base_weights": [str(path) for path in moved]})
    whole = train_lora(max_train_steps=3, **multiplied)
    assert all(torch.equal(whole.tensors[name], t) for name, t in resumed.tensors.items())


def test_bad_base_weights_are_refused_before_anything_is_loaded(
    options: Any, tmp_path: Path
) -> None:
    import sdxl_train

    (tmp_path / "empty.safetensors").write_bytes(b"")
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    other = {f"{layer}.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}
    save_file(other, tmp_path / "flux.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("empty", "flux", "absent")]
    changes = {"base_weights": files, "base_weights_multiplier": [1.0] * 4}
    with pytest.raises(UserError) as refused:
        sdxl_train.plan(options(**changes, dim_from_weights=True))
    for expected in (
        "is empty",
        "is a network for Flux",
        "absent.safetensors",
        "4 multipliers for 3 files",
        "no file to take ranks from",
    ):
        assert expected in str(refused.value)
