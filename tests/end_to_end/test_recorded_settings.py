"""Settings read back from the metadata of a file make the run that wrote it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

import sdxl_train
from sdxl_train import recorded_settings
from sdxl_train.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import MakeOptions, Trained, TrainLora

OPTIONS = {
    "network_args": ["conv_dim=2", "conv_alpha=1"],
    "network_dropout": 0.1,
    "optimizer_type": "AdamW",
    "optimizer_args": ["weight_decay=0.05", "betas=0.9,0.99"],
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
    "unet_lr": 5e-4,
    "min_snr_gamma": 5.0,
    "noise_offset": 0.05,
    "loss_type": "huber",
    "huber_c": 0.2,
    "min_timestep": 100,
    "shuffle_caption": True,
    "keep_tokens": 1,
    "max_train_steps": 3,
    "training_comment": "to be repeated",
}
WHERE = ("pretrained_model_name_or_path", "train_data_dir", "output_dir", "plugin")


@pytest.fixture(scope="module")
def trained(train_lora: TrainLora) -> Trained:
    return train_lora(**OPTIONS)


def test_written_settings_train_the_same_weights_again(
    trained: Trained, options: MakeOptions, tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    assert main(["inspect", str(trained.path), "--config", str(path)]) == 0
    where = {name: trained.options[name] for name in WHERE}

    # The size of the step between buckets is not recorded by anybody.
    asked = {"bucket_reso_steps": 32, "progress": False, "max_data_loader_n_workers": 0}
    again = sdxl_train.plan({**where, **asked, **sdxl_train.read_toml(path)[0]})

    before = sdxl_train.plan(trained.options)
    differ = {
        name: (item["value"], again.options.get(name, {}).get("value"))
        for name, item in before.options.items()
        if item["value"] != again.options.get(name, {}).get("value")
    }
    # What changes nothing, or only where things lie.
    assert set(differ) <= {"max_timestep", "network_module"}
    assert again.steps == before.steps


def test_settings_are_part_of_what_is_told(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(trained.path), "--json"]) == 0

    told = json.loads(capsys.readouterr().out)["settings"]
    assert told["network_args"] == ["conv_dim=2", "conv_alpha=1"]
    assert told["huber_c"] == 0.2
    assert "pretrained_model_name_or_path" not in told


def test_what_cannot_be_set_here_is_left_out_and_told() -> None:
    settings, refused = recorded_settings(
        {
            "ss_network_module": "networks.lora",
            "ss_network_dim": "Dynamic",
            "ss_network_args": '{"conv_dim": "4", "block_dims": "1,x", "strange": "1"}',
            "ss_optimizer": "some.where.Unheard(lr=1,",
            "ss_max_train_steps": "-3",
            "ss_seed": "7",
            "ss_min_snr_gamma": "5.0",
        }
    )

    assert settings == {
        "network_module": "networks.lora",
        "network_args": ["conv_dim=4"],
        "seed": 7,
        "min_snr_gamma": 5.0,
    }
    assert set(refused) == {
        "max_train_steps",
        "network_args.block_dims",
        "network_args.strange",
    }


def test_a_config_that_is_there_is_not_written_over(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text("mine")

    assert main(["inspect", str(trained.path), "--config", str(tmp_path / "run.toml")]) == 2

    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "run.toml").read_text() == "mine"
