"""``plan --memory``: the peak of memory that it foretells, and what it advises."""

from __future__ import annotations

import json
import shutil
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
WHOLE = "--network_dim 4 --train_batch_size 2 --mixed_precision no"


def plan_of(model: Path, data: Path, out: Path) -> list[str]:
    words = ["plan", "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data)]
    return [*words, "--output_dir", str(out), "--resolution", "64"]


@pytest.fixture(scope="module")
def plans() -> dict[str, dict[str, Any]]:
    """What was planned so far, by its flags: a plan takes seconds, and is the same each time."""
    return {}


@pytest.fixture
def plan(
    tiny_file: Path,
    photographs: Path,
    tmp_path: Path,
    plans: dict[str, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> Callable[[str], dict[str, Any]]:
    def make(flags: str) -> dict[str, Any]:
        if flags not in plans:
            words = plan_of(tiny_file, photographs, tmp_path)
            assert main([*words, *FLAGS.split(), *flags.split()]) == 0
            plans[flags] = json.loads(capsys.readouterr().out)
        return plans[flags]

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
    memory = plan(WHOLE)["memory"]
    assert memory["activation_bytes"] == pytest.approx(kept_by_a_real_step(tiny_file, 2), rel=0.02)
    # Adam keeps two fp32 numbers for each of the network's, which are fp32 too.
    assert memory["optimizer_bytes"] == pytest.approx(2 * memory["network_bytes"], rel=0.01)


def test_recomputed_levels_keep_no_activations(plan: Callable[[str], dict[str, Any]]) -> None:
    each = ("", " --gradient_checkpointing --checkpoint_levels 0", " --gradient_checkpointing")
    plans = [plan(f"{WHOLE}{flags}") for flags in each]
    kept = [found["memory"]["activation_bytes"] for found in plans]
    assert kept[0] > kept[1] > kept[2]
    assert kept[2] < 0.5 * kept[0]
    assert not [text for found in plans for text in found["warnings"] if "are available" in text]


def test_optimizer_that_needs_data_is_named(
    tiny_file: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "by_numpy.py").write_text(
        "import torch\n\n\n"
        "class ByNumpy(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n"
        "        self.param_groups[0]['params'][0].detach().numpy()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = plan_of(tiny_file, photographs, tmp_path)
    words += [*FLAGS.split(), "--network_dim", "4", "--optimizer_type", "by_numpy.ByNumpy"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "--optimizer_type: what by_numpy.ByNumpy keeps cannot be foretold" in told
    assert "plan without --memory" in told


def phases(memory: dict[str, int]) -> dict[str, int]:
    """The peaks by phase, without what this process holds."""
    end = "_peak_bytes"
    process = memory["process_bytes"]
    peaks = {name: peak for name, peak in memory.items() if name.endswith(end)}
    assert memory["peak_bytes"] == max(peaks.values())
    return {name.removesuffix(end): peak - process for name, peak in peaks.items()}


def test_caches_that_are_complete_need_no_filling(
    tiny_file: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    data = shutil.copytree(photographs, tmp_path / "data")
    words = plan_of(tiny_file, data, tmp_path / "out")
    words += ["--network_train_unet_only", "--cache_latents_to_disk"]
    words += ["--cache_text_encoder_outputs_to_disk", "--vae_batch_size", "4"]

    def planned() -> dict[str, int]:
        capsys.readouterr()
        assert main([*words, "--memory", "--json"]) == 0
        return phases(json.loads(capsys.readouterr().out)["memory"])

    empty = planned()
    assert set(empty) == {"latents", "captions", "passes", "update"}
    assert main(["cache", *words[1:]]) == 0
    full = planned()
    assert set(full) == {"passes", "update"}
    assert full["passes"] == empty["passes"]
    assert max(full.values()) <= max(empty.values())
    # Another caption is another encoding; the latents stay.
    (data / "2_photo" / "coffee.txt").write_text("a mug", encoding="utf-8")
    assert set(planned()) == {"captions", "passes", "update"}


def test_each_option_takes_and_gives_what_it_says(plan: Callable[[str], dict[str, Any]]) -> None:
    plain = plan("--network_dim 64 --mixed_precision bf16")["memory"]
    numbers = plain["network_bytes"] // 4

    def memory(flags: str) -> dict[str, Any]:
        found: dict[str, Any] = plan(f"--network_dim 64 --mixed_precision bf16 {flags}")["memory"]
        return found

    # Momentum is one number for each; the two of Adam come in fp32 with weights of 16 bits too.
    momentum = memory("--optimizer_type SGDNesterov")
    assert momentum["optimizer_bytes"] == numbers * 4
    narrow = memory("--full_bf16")
    assert narrow["network_bytes"] == numbers * 2
    assert narrow["optimizer_bytes"] == pytest.approx(numbers * 8, rel=0.01)
    # While it steps, weights and gradients are in fp32: as much as they take in fp32 always.
    assert phases(narrow)["update"] == pytest.approx(phases(plain)["update"], rel=0.02)
    # A gradient that steps at once is not there beside the next ones.
    fused = memory("--fused_backward_pass --max_grad_norm 0")
    spared = phases(plain)["passes"] - phases(fused)["passes"]
    assert 0.25 * numbers * 4 < spared <= numbers * 4
    average = memory("--ema_decay 0.9")
    assert phases(average)["passes"] - phases(plain)["passes"] == numbers * 4
