"""``save_model_as``: every format holds the same network, is read back, kept and pruned alike."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open

import sdxl_train
from sdxl_lora_plugins.model import SDXL
from sdxl_train import UserError
from sdxl_train.ldm.files.tensors import read_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.end_to_end.conftest import MakeOptions, SameTensors, Trained, TrainLora

ENDINGS = {"ckpt": ".ckpt", "diffusers_safetensors": ""}
NETWORK = {
    "max_train_steps": 3,
    "network_args": ["conv_dim=2", "conv_alpha=1"],
    "network_train_unet_only": True,
}
IN_FOLDER = "pytorch_lora_weights.safetensors"
Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module", params=ENDINGS)
def trained(request: pytest.FixtureRequest, train_lora: TrainLora) -> Trained:
    """Three steps in a format, each saved with its state; one checkpoint of the steps kept."""
    return train_lora(
        **NETWORK,
        save_model_as=request.param,
        save_every_n_steps=1,
        save_last_n_steps=1,
        save_state=True,
    )


@pytest.fixture(scope="module")
def reference(train_lora: TrainLora) -> dict[str, Tensor]:
    return train_lora(**NETWORK).tensors


def test_names_and_retention_are_those_of_every_format(trained: Trained) -> None:
    ending = ENDINGS[trained.options["save_model_as"]]

    assert [path.name for path in trained.result.files] == [
        f"photo-step00000003{ending}",
        f"photo{ending}",
    ]
    left = {path.name for path in trained.folder.iterdir()}
    assert left == {
        f"photo-step00000003{ending}",
        "photo-step00000003-state",
        f"photo{ending}",
        "photo-state",
        "photo.run.json",
        "initial.st",
        "steps.json",
    }


def test_every_format_holds_the_same_deltas(
    trained: Trained, reference: dict[str, Tensor], same_tensors: SameTensors
) -> None:
    if not trained.path.is_dir():
        assert same_tensors(dict(torch.load(trained.path, weights_only=True)), reference)
    ours = read_tensors(trained.path, SDXL)
    for name, down in reference.items():
        layer, _, kind = name.partition(".")
        if kind != "lora_down.weight":
            continue
        scale = reference[f"{layer}.alpha"] / len(down)
        expected = reference[f"{layer}.lora_up.weight"].flatten(1) @ down.flatten(1) * scale
        up, rows = ours[f"{layer}.lora_up.weight"], ours[name]
        found = up.flatten(1) @ rows.flatten(1) * (ours[f"{layer}.alpha"] / len(rows))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_training_goes_on_from_a_file_and_a_state_of_every_format(
    trained: Trained, train_lora: TrainLora, tmp_path: Path
) -> None:
    # Factors that have alpha / rank in them come with an alpha that is the rank.
    alphas = {"network_alpha": 4.0, "network_args": ["conv_dim=2", "conv_alpha=2"]}
    own = {**trained.options, "output_dir": str(tmp_path)}
    state = str(trained.folder / "photo-step00000003-state")

    resumed = train_lora(**{**own, "max_train_steps": 4, "resume": state})
    assert [step["step"] for step in resumed.steps] == [4]
    second = train_lora(
        **{
            **own,
            "max_train_steps": 1,
            "network_weights": str(trained.path),
            **(alphas if trained.path.is_dir() else {}),
        }
    )

    began = read_tensors(trained.path, SDXL)
    assert torch.equal(second.initial[f"{Q}.lora_up.weight"], began[f"{Q}.lora_up.weight"])
    # What the resumed run had written was out of the way by then.
    (moved,) = tmp_path.glob("photo-until-*")
    assert (moved / trained.path.name).exists()
    assert (moved / f"photo-step00000004{trained.path.suffix}").exists()


@pytest.mark.parametrize("trained", ["diffusers_safetensors"], indirect=True)
def test_folder_loads_in_diffusers_with_the_effect_of_the_network(
    trained: Trained, tiny_folder: Path, reference: dict[str, Tensor]
) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_folder)
    before = pipe.unet.state_dict()[
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    ].clone()

    pipe.load_lora_weights(trained.path)
    pipe.fuse_lora()

    fused = pipe.unet.state_dict()
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.base_layer.weight"
    delta = reference[f"{Q}.lora_up.weight"] @ reference[f"{Q}.lora_down.weight"] * (2 / 4)
    assert delta.norm() > 0
    torch.testing.assert_close(fused[name] - before, delta, rtol=1e-4, atol=1e-7)
    with safe_open(trained.path / IN_FOLDER, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_seed"] == "42"
    assert json.loads(metadata["lora_adapter_metadata"])["unet.r"] == 4


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"network_module": "lokr"}, "LoKr"),
        ({"network_args": ["dora_wd=true"]}, "DoRA"),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=loha"]}, "LoHa"),
    ],
)
def test_what_diffusers_cannot_load_is_refused_before_training(
    options: MakeOptions, changes: dict[str, Any], title: str
) -> None:
    with pytest.raises(UserError) as caught:
        sdxl_train.plan(options(save_model_as="diffusers", **changes))

    (problem,) = caught.value.problems
    assert "save_model_as" in problem.place
    assert title in problem.message


def test_a_folder_of_that_name_that_is_no_network_is_left_alone(
    train_lora: TrainLora, tmp_path: Path
) -> None:
    (tmp_path / "photo").mkdir()
    (tmp_path / "photo" / "notes.txt").write_text("mine")

    trained = train_lora(
        save_model_as="diffusers", max_train_steps=1, output_dir=str(tmp_path), overwrite=True
    )

    assert (trained.path / "notes.txt").read_text() == "mine"
    assert (trained.path / IN_FOLDER).is_file()


def test_metadata_that_a_format_has_no_place_for_is_told(options: MakeOptions) -> None:
    plan = sdxl_train.plan(options(save_model_as="pt", training_comment="a", metadata_author="b"))

    told = [warning for warning in plan.warnings if "pt files have no metadata" in warning]
    assert len(told) == 2
