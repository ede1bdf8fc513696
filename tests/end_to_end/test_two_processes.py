"""Two processes with batches of B train as one with batches of 2 B: real processes, over gloo."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.end_to_end.conftest import read_metadata

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.end_to_end.conftest import MakeOptions, TrainLora

STEPS = 10

# Plain gradient descent moves a weight by what its gradient is. Adam divides by the gradient's
# size, so a gradient that is only rounding would show as a whole step.
DESCENT = {"optimizer_type": "SGD", "learning_rate": 0.1, "max_train_steps": STEPS}

SCENARIOS: dict[str, dict[str, Any]] = {
    "text encoders, LoRA+, noises, accumulation": {
        "network_args": ["loraplus_lr_ratio=4"],
        "gradient_accumulation_steps": 2,
        "noise_offset": 0.05,
        "adaptive_noise_scale": 0.1,
        "multires_noise_iterations": 4,
        "ip_noise_gamma": 0.1,
        "immiscible_noise": True,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "train_batch_size": 2,
    },
    "caches, prior and masked loss, batches too small for two": {
        "network_train_unet_only": True,
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        "prior_loss_weight": 0.5,
        "alpha_mask": True,
        "train_batch_size": 1,
    },
    "LoKr of LyCORIS": {
        "plugin": ["lycoris"],
        "network_module": "lycoris.kohya",
        "network_args": ["algo=lokr", "factor=4"],
        "cache_latents_to_disk": True,
        "cache_latents": True,
        "flip_aug": True,
        "train_batch_size": 1,
    },
}


def train_as_one_of_two(index: int, meeting: Path, runs: Mapping[str, dict[str, Any]]) -> None:
    """Train every run in turn, as process ``index``, and write down how many latents it made."""
    import sdxl_train
    from sdxl_train.data import cache

    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=index, world_size=2
    )
    encode: Any = cache.LatentCache._encode
    made: list[int] = []

    def counted(self: Any, spec: Any, *arguments: Any) -> Any:
        made.append(len(spec.samples))
        return encode(self, spec, *arguments)

    vars(cache)["LatentCache"]._encode = counted
    results = {}
    for name, options in runs.items():
        made.clear()
        result = sdxl_train.train(options)
        results[name] = {"latents": sum(made), "loss": result.final_loss, "steps": result.steps}
    meeting.with_name(f"results-{index}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """The photographs, half of each transparent."""
    folder = tmp_path_factory.mktemp("masked")
    for path in (photographs / "2_photo").iterdir():
        target = folder / "2_photo" / path.name
        target.parent.mkdir(exist_ok=True)
        if path.suffix == ".png":
            image = Image.open(path).convert("RGBA")
            image.putalpha(Image.linear_gradient("L").resize(image.size))
            image.save(target)
        else:
            target.write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def regularization(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image, which makes the number of square ones odd."""
    folder = tmp_path_factory.mktemp("regularization")
    (folder / "1_thing").mkdir()
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(folder / "1_thing" / "0.png")
    (folder / "1_thing" / "0.txt").write_text("a thing")
    return folder


@pytest.fixture(scope="module")
def scenarios(
    options: MakeOptions, photographs: Path, masked: Path, regularization: Path
) -> dict[str, dict[str, Any]]:
    chosen = {name: {**DESCENT, **changes} for name, changes in SCENARIOS.items()}
    for changes in chosen.values():
        if "alpha_mask" in changes:
            changes |= {"train_data_dir": str(masked), "reg_data_dir": str(regularization)}
    return chosen


@pytest.fixture(scope="module")
def together(
    scenarios: dict[str, dict[str, Any]],
    options: MakeOptions,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """Every scenario trained by two processes: folder, and what each process reports."""
    meeting = tmp_path_factory.mktemp("meeting") / "store"
    runs = {name: options(**changes) for name, changes in scenarios.items()}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["sdxl_train.run", "sdxl_train.planning", "sdxl_train.ldm.loading"]
    )
    processes = [
        context.Process(target=train_as_one_of_two, args=(index, meeting, runs))
        for index in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    reports = [
        json.loads(meeting.with_name(f"results-{index}.json").read_text()) for index in range(2)
    ]
    return {
        name: {
            "folder": Path(run["output_dir"]),
            "reports": [report[name] for report in reports],
        }
        for name, run in runs.items()
    }


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one_with_twice_the_batch(
    name: str,
    scenarios: dict[str, dict[str, Any]],
    together: dict[str, dict[str, Any]],
    train_lora: TrainLora,
) -> None:
    changes = scenarios[name]
    alone = train_lora(**{**changes, "train_batch_size": 2 * changes["train_batch_size"]})
    two = together[name]
    tensors = load_file(two["folder"] / "photo.safetensors")
    assert tensors.keys() == alone.tensors.keys()
    for key, tensor in alone.tensors.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=1e-6)
    for report in two["reports"]:
        assert report["steps"] == STEPS
        assert report["loss"] == pytest.approx(alone.result.final_loss, abs=1e-5)
    metadata = read_metadata(two["folder"] / "photo.safetensors")
    for key in ("ss_total_batch_size", "ss_num_batches_per_epoch", "ss_num_epochs", "ss_steps"):
        assert metadata[key] == alone.metadata[key], key


def test_each_latent_is_encoded_once(together: dict[str, dict[str, Any]]) -> None:
    cached = {
        # Five photographs and one for regularization; five, plain and mirrored.
        "caches, prior and masked loss, batches too small for two": 6,
        "LoKr of LyCORIS": 10,
    }
    for name, latents in cached.items():
        first, second = (report["latents"] for report in together[name]["reports"])
        assert first + second == latents
        assert first
        assert second


def test_main_process_alone_writes_and_tells(together: dict[str, dict[str, Any]]) -> None:
    folder = together["text encoders, LoRA+, noises, accumulation"]["folder"]
    written = {path.name for path in folder.iterdir()}
    assert written == {"initial.st", "steps.json", "photo.safetensors", "photo.run.json"}
    steps = json.loads((folder / "steps.json").read_text())
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    # All images of an epoch, which is two steps, whichever process had them.
    assert sum(len(step["keys"]) for step in steps[:2]) == 10
