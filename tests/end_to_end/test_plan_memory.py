"""``plan --memory``: the peak of memory that it foretells, and what it advises."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdxl_lora_plugins.model import Sdxl
from sdxl_lora_plugins.networks import Lora
from sdxl_train.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FLAGS = "--network_train_unet_only --cache_latents --cache_text_encoder_outputs --memory --json"


@pytest.fixture
def plan(
    tiny_file: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], dict[str, Any]]:
    def make(flags: str) -> dict[str, Any]:
        words = ["--pretrained_model_name_or_path", str(tiny_file), "--train_data_dir"]
        words += [str(photographs), "--output_dir", str(tmp_path), "--resolution", "64"]
        assert main(["plan", *words, *FLAGS.split(), *flags.split()]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return make


def kept_by_a_real_step(tiny_file: Path, batch: int) -> int:
    """Bytes of what a forward pass of 64 x 64 keeps, each storage once, weights left out."""
    options = Sdxl(pretrained_model_name_or_path=str(tiny_file), network_train_unet_only=True)
    model = options.build("cpu", torch.float32)
    adapter = Lora(network_dim=4).build(model)
    modules = (model.denoiser, *adapter.modules())
    own = {p.data_ptr() for module in modules for p in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    size = torch.full((batch, 2), 64)
    condition = {**model.encode_text(["a"] * batch), "original_size": size, "target_size": size}
    condition = {name: tensor.detach() for name, tensor in condition.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = model.predict(
            torch.zeros(batch, 4, 8, 8),
            torch.zeros(batch, dtype=torch.int64),
            {**condition, "crop_top_left": torch.zeros_like(size)},
        )
    assert prediction.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_activations_are_those_that_a_real_step_keeps(
    plan: Callable[[str], dict[str, Any]], tiny_file: Path
) -> None:
    memory = plan("--network_dim 4 --train_batch_size 2 --mixed_precision no")["memory"]
    assert memory["activation_bytes"] == pytest.approx(kept_by_a_real_step(tiny_file, 2), rel=0.02)
    # Adam keeps two fp32 numbers for each of the network's, which are fp32 too.
    assert memory["optimizer_bytes"] == 2 * memory["network_bytes"]


def test_what_does_not_fit_is_told_with_the_options_to_change(
    plan: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan("--network_dim 4 --mixed_precision no")
    monkeypatch.setattr("sdxl_train.footprint.available_bytes", lambda device: 10**6)
    found = plan("--network_dim 4 --gradient_checkpointing --mixed_precision no")
    some = plan(
        "--network_dim 4 --gradient_checkpointing --checkpoint_levels 0 --mixed_precision no"
    )
    kept = [each["memory"]["activation_bytes"] for each in (whole, some, found)]
    assert kept[0] > kept[1] > kept[2]
    assert found["memory"]["activation_bytes"] < 0.5 * whole["memory"]["activation_bytes"]
    (told,) = [text for text in found["warnings"] if "are available" in text]
    assert "--mixed_precision bf16, then --fp8_base" in told
    assert "--gradient_checkpointing" not in told
    assert not [text for text in whole["warnings"] if "are available" in text]
