"""The files of a run: names, numbers, dtypes, metadata and hashes."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from sdxl_train.config import OutputOptions
from sdxl_train.counts import SaveSchedule, StepCounts

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Trained, TrainLora

GOLDEN = Path(__file__).parents[1] / "data" / "metadata.json.gz"


@pytest.fixture(scope="module")
def epochs_run(train_lora: TrainLora) -> Trained:
    """Four epochs of three steps, saved by epochs and by steps, two of each kept."""
    return train_lora(
        train_batch_size=4,
        max_train_steps=None,
        max_train_epochs=4,
        save_every_n_epochs=1,
        save_last_n_epochs=2,
        save_every_n_steps=4,
        save_last_n_steps=2,
        save_precision="bf16",
        cache_latents=True,
        training_comment="trained for a test",
    )


@pytest.fixture(scope="module")
def unnamed_run(train_lora: TrainLora) -> Trained:
    """Two epochs without a name, and with as little metadata as possible."""
    return train_lora(
        output_name=None,
        train_batch_size=4,
        max_train_steps=6,
        save_every_n_epochs=1,
        save_every_n_steps=4,
        save_precision="fp16",
        no_metadata=True,
        network_train_unet_only=True,
    )


def networks_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def test_names_and_numbers_are_those_of_sd_scripts(epochs_run: Trained) -> None:
    # Twelve steps: epochs end at 3, 6, 9 and 12; the last epoch has no file of its own.
    assert networks_in(epochs_run.folder) == [
        "photo-000002.safetensors",
        "photo-000003.safetensors",
        "photo-step00000008.safetensors",
        "photo-step00000012.safetensors",
        "photo.safetensors",
    ]
    assert sorted(path.name for path in epochs_run.result.files) == networks_in(epochs_run.folder)
    assert epochs_run.path.name == "photo.safetensors"


def test_files_tell_their_step_and_epoch(epochs_run: Trained) -> None:
    told = {
        path.stem: (read(path)[1]["ss_steps"], read(path)[1]["ss_epoch"])
        for path in epochs_run.result.files
    }
    assert told == {
        "photo-000002": ("6", "2"),
        "photo-000003": ("9", "3"),
        "photo-step00000008": ("8", "3"),
        "photo-step00000012": ("12", "4"),
        "photo": ("12", "4"),
    }


def test_last_step_and_final_file_hold_the_same_network(epochs_run: Trained) -> None:
    step, _ = read(epochs_run.folder / "photo-step00000012.safetensors")
    earlier, _ = read(epochs_run.folder / "photo-step00000008.safetensors")
    final = epochs_run.tensors
    assert all(torch.equal(step[name], tensor) for name, tensor in final.items())
    assert any(not torch.equal(earlier[name], tensor) for name, tensor in final.items())


def test_unnamed_run_uses_the_names_of_sd_scripts(unnamed_run: Trained) -> None:
    assert networks_in(unnamed_run.folder) == [
        "at-step00000004.safetensors",
        "epoch-000001.safetensors",
        "last.safetensors",
    ]
    assert (unnamed_run.folder / "last.run.json").is_file()


def test_nothing_but_networks_and_the_record_is_left(epochs_run: Trained) -> None:
    others = {path.name for path in epochs_run.folder.iterdir()}
    others -= {"initial.st", "steps.json", *networks_in(epochs_run.folder)}
    assert others == {"photo.run.json"}


@pytest.mark.parametrize(
    ("ratio", "epochs", "saved"), [(3, 10, [3, 6, 9]), (20, 4, [1, 2, 3]), (1, 4, [])]
)
def test_epoch_ratio_saves_each_floor_of_epochs(
    ratio: int, epochs: int, saved: list[int], tmp_path: Path
) -> None:
    output = OutputOptions(output_dir=tmp_path, save_n_epoch_ratio=ratio)
    counts = StepCounts(
        batches_per_epoch=2, steps_per_epoch=2, epochs=epochs, total=2 * epochs, warmup=0
    )
    schedule = SaveSchedule.of(output, counts)
    points = [point for step in schedule.steps() for point in schedule.due(step)]
    assert [point.number for point in points if point.kind == "epoch"] == saved
    assert points[-1].kind == "final"


def test_save_precision_is_the_dtype_of_every_tensor(
    epochs_run: Trained, unnamed_run: Trained
) -> None:
    for run, dtype in ((epochs_run, torch.bfloat16), (unnamed_run, torch.float16)):
        for path in run.result.files:
            tensors, _ = read(path)
            assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_metadata_has_the_keys_of_sd_scripts(epochs_run: Trained) -> None:
    golden = json.loads(gzip.decompress(GOLDEN.read_bytes()))["t_bf16.safetensors"]["metadata"]
    assert epochs_run.metadata.keys() == golden.keys()


def test_metadata_tells_what_the_run_did(epochs_run: Trained) -> None:
    metadata = epochs_run.metadata
    expected = {
        "ss_output_name": "photo",
        "ss_seed": "42",
        "ss_learning_rate": "0.001",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_num_train_images": "10",
        "ss_num_reg_images": "0",
        "ss_num_batches_per_epoch": "3",
        "ss_num_epochs": "4",
        "ss_max_train_steps": "12",
        "ss_steps": "12",
        "ss_epoch": "4",
        "ss_batch_size_per_device": "4",
        "ss_total_batch_size": "4",
        "ss_resolution": "(64, 64)",
        "ss_cache_latents": "True",
        "ss_enable_bucket": "True",
        "ss_mixed_precision": "no",
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_lr_scheduler": "constant",
        "ss_loss_type": "l2",
        "ss_training_comment": "trained for a test",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_noise_offset": "None",
        "ss_unet_lr": "None",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.prediction_type": "epsilon",
        "modelspec.title": "photo",
        "modelspec.resolution": "64x64",
    }
    assert {name: metadata.get(name) for name in expected} == expected
    assert json.loads(metadata["ss_dataset_dirs"]) == {"2_photo": {"n_repeats": 2, "img_count": 5}}
    buckets = json.loads(metadata["ss_bucket_info"])["buckets"].values()
    assert sorted((bucket["resolution"], bucket["count"]) for bucket in buckets) == [
        ([64, 32], 4),
        ([64, 64], 6),
    ]
    assert float(metadata["ss_training_started_at"]) < float(metadata["ss_training_finished_at"])


def test_metadata_names_no_folder_of_this_machine(epochs_run: Trained) -> None:
    folders = {
        str(folder)
        for name in ("pretrained_model_name_or_path", "train_data_dir", "output_dir")
        for folder in [Path(epochs_run.options[name]), *Path(epochs_run.options[name]).parents][:-1]
    }
    for name, text in epochs_run.metadata.items():
        assert isinstance(text, str)
        assert not [folder for folder in folders if folder + os.sep in text or folder == text], name
    assert epochs_run.metadata["ss_sd_model_name"] == "tiny-sdxl.safetensors"


def test_reduced_metadata_is_what_clients_need(unnamed_run: Trained) -> None:
    names = set(unnamed_run.metadata)
    kept = {name for name in names if name.startswith("ss_")}
    assert kept == {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
    }
    assert {"sshs_model_hash", "sshs_legacy_hash", "modelspec.architecture"} <= names
    assert all(name.startswith(("ss_", "sshs_", "modelspec.")) for name in names)


def test_hashes_of_the_network_verify(epochs_run: Trained, unnamed_run: Trained) -> None:
    for path in (*epochs_run.result.files, *unnamed_run.result.files):
        data = path.read_bytes()
        behind = 8 + int.from_bytes(data[:8], "little")
        tensors, metadata = read(path)
        assert metadata["sshs_model_hash"] == hashlib.sha256(data[behind:]).hexdigest()
        told = {name: text for name, text in metadata.items() if name.startswith("ss_")}
        plain = safetensors.torch.save(tensors, told)
        legacy = hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8]
        assert metadata["sshs_legacy_hash"] == legacy


def test_hashes_of_the_base_model_verify(epochs_run: Trained, tiny_file: Path) -> None:
    data = tiny_file.read_bytes()
    metadata = epochs_run.metadata
    assert metadata["ss_new_sd_model_hash"] == hashlib.sha256(data).hexdigest()
    short = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert metadata["ss_sd_model_hash"] == short


def test_record_tells_options_results_and_versions(epochs_run: Trained) -> None:
    record: dict[str, Any] = json.loads((epochs_run.folder / "photo.run.json").read_text("utf-8"))
    assert record["results"]["status"] == "complete"
    assert record["results"]["steps"] == 12
    assert record["results"]["files"] == [path.name for path in epochs_run.result.files]
    assert record["results"]["final_loss"] == pytest.approx(epochs_run.steps[-1]["loss"])
    assert record["seed"] == 42
    assert record["options"]["network_dim"] == {"value": 4, "origin": "python"}
    assert record["options"]["max_grad_norm"] == {"value": 1.0, "origin": "default"}
    assert record["packages"]["torch"]
    assert {plugin["name"] for plugin in record["plugins"]} == {"sdxl-lora", "recorder"}
