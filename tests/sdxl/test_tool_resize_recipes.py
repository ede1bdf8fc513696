"""Recipes of ``resize`` against their formula: log10(s) - sum of w * log10(reference)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_train.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

LAYERS = {
    f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_{letter}": (
        f"model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_{letter}.weight"
    )
    for letter in "qkv"
}
VALUES = {name: torch.tensor([2.0, 0.7, 0.11, 0.013]) / 3**i for i, name in enumerate(LAYERS)}


@pytest.fixture(scope="session")
def base(tiny_file: Path) -> dict[str, Tensor]:
    tensors = load_file(tiny_file)
    return {name: tensors[stored] for name, stored in LAYERS.items()}


@pytest.fixture
def network(base: dict[str, Tensor], tmp_path: Path) -> Path:
    """Three layers whose deltas have known singular values."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, weight in base.items():
        rows, columns = weight.shape
        u = torch.linalg.qr(torch.randn(rows, 4, generator=generator)).Q
        v = torch.linalg.qr(torch.randn(columns, 4, generator=generator)).Q
        tensors[f"{name}.lora_up.weight"] = (u * VALUES[name]).contiguous()
        tensors[f"{name}.lora_down.weight"] = v.T.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    path = tmp_path / "network.safetensors"
    save_file(tensors, path, {"ss_training_comment": "mine"})
    return path


def ranks(path: Path) -> dict[str, int]:
    tensors = load_file(path)
    return {name: len(tensors.get(f"{name}.lora_down.weight", ())) for name in LAYERS}


def above(least: float, reference: dict[str, float]) -> dict[str, int]:
    return {
        name: int((values.log10() - torch.tensor(reference[name]).log10() >= least).sum())
        for name, values in VALUES.items()
    }


def test_weighted_sum_of_loras_is_resized_as_one(network: Path, tmp_path: Path) -> None:
    tensors = load_file(network)
    second = tmp_path / "second.safetensors"
    save_file(
        {
            k: -t if k.endswith("up.weight") else t.flip(0) if t.ndim else t
            for k, t in tensors.items()
        },
        second,
    )
    made = tmp_path / "made.safetensors"
    words = [f"{network}:0.5,{second}:2", "-o", str(made), "--new_rank", "8"]

    assert main(["resize", *words]) == 0

    (found, one, two) = (load_file(path) for path in (made, network, second))
    for name in LAYERS:
        deltas = [
            t[f"{name}.lora_up.weight"] @ t[f"{name}.lora_down.weight"] for t in (found, one, two)
        ]
        torch.testing.assert_close(deltas[0], 0.5 * deltas[1] + 2 * deltas[2])
        assert len(found[f"{name}.lora_down.weight"]) == found[f"{name}.alpha"]


def test_weights_that_are_no_numbers_are_told(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{network}:half", "-o", str(tmp_path / "made.safetensors"), "--new_rank", "2"]
    assert main(["resize", *words]) == 2
    assert "has no number behind its colon" in capsys.readouterr().err


def test_command_of_the_guide_scores_against_the_checkpoint(
    network: Path, tiny_file: Path, base: dict[str, Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()

    words = ["-o", str(out), "-r", "fro_ckpt=1,thr=-1.05", str(tiny_file), str(network)]
    assert main(["resize", *words]) == 0

    (made,) = out.iterdir()
    assert made.name == "network_frockpt1_th-1.05.safetensors"
    expected = above(-1.05, {name: float(weight.norm()) for name, weight in base.items()})
    assert ranks(made) == expected
    assert len(set(expected.values())) > 1
    with safe_open(made, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_training_comment"] == "resized from network.safetensors; mine"
    assert json.loads(metadata["resize_params"])["recipe"] == "fro_ckpt=1,thr=-1.05"


@pytest.mark.parametrize("reference", ["spn_ckpt", "spn_lora", "fro_lora", "params"])
def test_each_reference_is_what_its_name_says(
    reference: str, network: Path, tiny_file: Path, base: dict[str, Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    references: dict[str, Callable[[str], Tensor | int]] = {
        "spn_ckpt": lambda name: torch.linalg.matrix_norm(base[name], 2),
        "spn_lora": lambda name: VALUES[name][0],
        "fro_lora": lambda name: VALUES[name].norm(),
        "params": lambda name: sum(base[name].shape),
    }
    numbers = {name: float(references[reference](name)) for name in LAYERS}
    least = -2.4 if reference == "params" else -1.0

    words = ["--save_to", str(out), "--recipe", f"{reference}=3,thr={least}", str(network)]
    assert main(["resize", *words, "--sd_model", str(tiny_file)]) == 0

    assert ranks(out) == above(least, numbers)


def test_size_keeps_the_best_that_fit(network: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    # 64 + 64 fp16 numbers a rank: four ranks and a half fit. The largest values are 2, 0.7, 2/3,
    # 0.7/3 and 2/9.
    size = 4.5 * 128 * 2 / 2**20
    words = ["--recipe", f"fro_lora=0.000001,params=1,size={size}", "--save_precision", "fp16"]

    assert main(["resize", str(network), *words, "-o", str(out)]) == 0

    assert list(ranks(out).values()) == [2, 2, 0]


def test_subspace_compares_with_what_the_weight_does_along_the_same_directions(
    network: Path, tiny_file: Path, base: dict[str, Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    given = load_file(network)
    expected = {}
    for name, weight in base.items():
        up, down = given[f"{name}.lora_up.weight"], given[f"{name}.lora_down.weight"]
        along = torch.einsum("mk,mn,kn->k", up / VALUES[name], weight, down).abs()
        expected[name] = int((VALUES[name].log10() - along.log10() >= 0.4).sum())

    words = ["-r", "subspace=1,thr=0.4", str(network), "--sd_model", str(tiny_file)]
    assert main(["resize", *words, "-o", str(out)]) == 0

    assert ranks(out) == expected


def test_several_recipes_and_networks_give_a_file_each_and_rescale_scales(
    network: Path, tmp_path: Path
) -> None:
    other = network.with_name("other.safetensors")
    other.write_bytes(network.read_bytes())
    out = tmp_path / "out"
    out.mkdir()

    recipes = "spn_lora=1,thr=-0.5:spn_lora,rescale=0.5,thr=-9"
    assert main(["resize", str(network), str(other), "-r", recipes, "-o", str(out)]) == 0

    assert sorted(path.name for path in out.iterdir()) == [
        "network_spnlora1_scale0.5_th-9.safetensors",
        "network_spnlora1_th-0.5.safetensors",
        "other_spnlora1_scale0.5_th-9.safetensors",
        "other_spnlora1_th-0.5.safetensors",
    ]
    half, whole = load_file(out / "network_spnlora1_scale0.5_th-9.safetensors"), load_file(network)
    for name in LAYERS:
        deltas = [
            t[f"{name}.lora_up.weight"] @ t[f"{name}.lora_down.weight"] for t in (half, whole)
        ]
        torch.testing.assert_close(deltas[0], 0.5 * deltas[1])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("fro_ckpt=1", "needs either thr or size"),
        ("fro_ckpt=1,thr=-3,size=3", "needs either thr or size"),
        ("thr=-3", "has no weight of spn_lora, spn_ckpt"),
        ("frob=1,thr=-3", "'frob' is none of spn_lora"),
        ("fro_ckpt=x,thr=-3", "'fro_ckpt=x' has no number"),
        ("fro_ckpt=1,thr", "'thr' has no number"),
        ("fro_lora=1,size=-3", "size is a number of MiB above 0"),
        ("fro_ckpt=1,thr=-3", "scores against the base model, and none is named"),
        ("fro_lora=1,thr=9", "nothing is left to write"),
    ],
)
def test_wrong_recipe_is_told(
    recipe: str, message: str, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"

    assert main(["resize", str(network), "-r", recipe, "-o", str(out)]) == 2

    assert message in capsys.readouterr().err
    assert not out.exists()


def test_dry_run_tells_the_ranks_and_writes_nothing(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"

    words = ["-r", "spn_lora=1,thr=-0.5", "-o", str(out), "--dry_run"]
    assert main(["resize", str(network), *words]) == 0

    told = capsys.readouterr().out
    assert all(f"{name}: LoRA of rank 4 -> 2, " in told for name in LAYERS)
    assert not out.exists()
