"""The metadata of files against what sd-scripts wrote in a run with the same options."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import sdxl_train
from sdxl_train import UserError
from sdxl_train.options import Setting, Words
from sdxl_train.record import describe_optimizer

if TYPE_CHECKING:
    from tests.end_to_end.conftest import MakeOptions, Trained, TrainLora

GOLDEN = Path(__file__).parents[1] / "data" / "metadata.json.gz"
PNG = b"\x89PNG\r\n\x1a\n picture"
SECRET = "hf_doNotTellAnybody"

OTHERS = {
    # Of the golden run's own data, length, weights and clock.
    "modelspec.date",
    "modelspec.implementation_version",
    "ss_bucket_info",
    "ss_dataset_dirs",
    "ss_lr_warmup_steps",
    "ss_max_train_steps",
    "ss_new_sd_model_hash",
    "ss_num_batches_per_epoch",
    "ss_num_train_images",
    "ss_sd_model_hash",
    "ss_sd_model_name",
    "ss_sd_scripts_commit_hash",
    "ss_session_id",
    "ss_steps",
    "ss_tag_frequency",
    "ss_training_finished_at",
    "ss_training_started_at",
    "sshs_legacy_hash",
    "sshs_model_hash",
}


@pytest.fixture(scope="module")
def trained(train_lora: TrainLora, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The options of the golden run, and everything a user can say of a network."""
    folder = tmp_path_factory.mktemp("described")
    (folder / "thumbnail.png").write_bytes(PNG)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_TOKEN", SECRET)
        return train_lora(
            output_name="trace_lokr",
            network_module="lycoris.kohya",
            network_args=["conv_dim=4", "conv_alpha=1", "algo=lokr", "factor=8"],
            network_dim=4,
            network_alpha=2,
            resolution=256,
            min_bucket_reso=256,
            max_bucket_reso=1024,
            bucket_no_upscale=False,
            bucket_reso_steps=64,
            train_batch_size=2,
            min_snr_gamma=5.0,
            noise_offset=0.05,
            max_train_steps=1,
            min_timestep=100,
            metadata_author="an author",
            metadata_description="a photograph",
            metadata_license="CC0-1.0",
            metadata_tags="photo, test",
            metadata_usage_hint="weight 1",
            metadata_trigger_phrase="photo",
            metadata_merged_from="nothing",
            metadata_preprocessor="none",
            metadata_is_negative_embedding="false",
            metadata_thumbnail=str(folder / "thumbnail.png"),
        )


def test_metadata_is_that_of_sd_scripts_for_the_same_options(trained: Trained) -> None:
    golden = json.loads(gzip.decompress(GOLDEN.read_bytes()))["trace_lokr.safetensors"]["metadata"]
    golden["ss_network_args"] = json.loads(golden["ss_network_args"])
    found = {**trained.metadata, "ss_network_args": json.loads(trained.metadata["ss_network_args"])}

    expected = {name: text for name, text in golden.items() if name not in OTHERS}
    assert {name: found.get(name) for name in expected} == expected
    assert golden.keys() <= found.keys()


def test_model_specification_has_what_the_user_says(trained: Trained) -> None:
    told = {
        name.removeprefix("modelspec."): text
        for name, text in trained.metadata.items()
        if name.startswith("modelspec.")
    }
    expected = {
        "title": "trace_lokr",
        "author": "an author",
        "description": "a photograph",
        "license": "CC0-1.0",
        "tags": "photo, test",
        "usage_hint": "weight 1",
        "trigger_phrase": "photo",
        "merged_from": "nothing",
        "preprocessor": "none",
        "is_negative_embedding": "false",
        "thumbnail": "data:image/png;base64,iVBORw0KGgogcGljdHVyZQ==",
        # As sd-scripts writes it: both ends, though only one was set.
        "timestep_range": "100,1000",
    }
    assert {name: told.get(name) for name in expected} == expected


def test_metadata_and_record_tell_no_secret_of_the_environment(trained: Trained) -> None:
    for path in trained.folder.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    "path", ["/home/me/masks.toml", "~/masks.toml", "./masks.toml", r"C:\Users\me\masks.toml"]
)
def test_metadata_names_files_in_arguments_without_their_folders(path: str) -> None:
    setting = Setting(value=Words((path,)), place="--optimizer_args", origin="command line")
    config: Any = SimpleNamespace(settings={"optimizer_args.file": setting})
    optimizer = torch.optim.SGD([torch.zeros(1)])

    assert describe_optimizer(optimizer, config) == "torch.optim.sgd.SGD(file=masks.toml)"


def test_title_of_the_user_comes_before_the_name(options: MakeOptions) -> None:
    plan = sdxl_train.plan(options(metadata_title="a title"))

    assert plan.options["metadata_title"]["value"] == "a title"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"<html>", "is no PNG, JPEG or WebP image"),
        (PNG + bytes(1_000_000), "bytes, more than 1,000,000"),
    ],
)
def test_wrong_thumbnail_is_refused(
    options: MakeOptions, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "thumbnail.png"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UserError) as caught:
        sdxl_train.plan(options(metadata_thumbnail=str(path)))

    (problem,) = caught.value.problems
    assert problem.place == "--metadata_thumbnail" or "metadata_thumbnail" in problem.place
    assert message in problem.message
