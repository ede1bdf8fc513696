"""Beginning with the weights of a file."""

from __future__ import annotations

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
        ({"network_module": "lokr"}, "lokr_w1"),
    ):
        with pytest.raises(UserError, match=message):
            sdxl_train.plan(options(network_weights=str(trained.path), **changes))
    state = load_file(trained.path)
    some = {name: t for name, t in state.items() if "_te1_" not in name}
    save_file(some, tmp_path / "some.safetensors")
    sdxl_train.plan(options(network_weights=str(tmp_path / "some.safetensors")))
    with pytest.raises(UserError):
        sdxl_train.plan(options(network_weights=str(tmp_path / "absent.safetensors")))
