"""Commands on network files against formulas of their own: W + sum of ratio * alpha / r * B A."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_lora_plugins.commands.convert import Convert
from sdxl_lora_plugins.commands.extract import Extract
from sdxl_lora_plugins.commands.merge import Merge
from sdxl_lora_plugins.commands.resize import Resize
from sdxl_train import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_input_blocks_4_0_in_layers_2"
TE1 = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
TE2_K = "lora_te2_text_model_encoder_layers_0_self_attn_k_proj"
UNET = "model.diffusion_model."
STORED = {
    Q: f"{UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight",
    CONV: f"{UNET}input_blocks.4.0.in_layers.2.weight",
    TE1: "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    TE2_K: "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
}


def shapes(base: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the layers; text encoder 2 keeps query, key and value in one tensor."""
    found = {name: tuple(base[stored].shape) for name, stored in STORED.items()}
    rows, columns = found[TE2_K]
    return {**found, TE2_K: (rows // 3, columns)}


def lora(path: Path, base: dict[str, Tensor], *, seed: int, rank: int, alpha: float) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(base).items():
        ones = [1] * (len(shape) - 2)
        tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], rank, *ones, generator=generator)
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, *shape[1:], generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, {"ss_output_name": "first", "ss_network_dim": str(rank)})
    return path


def delta(path: Path, name: str) -> Tensor:
    tensors = load_file(path)
    up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
    scale = tensors[f"{name}.alpha"] / len(down)
    return scale * torch.einsum("or,r...->o...", up.flatten(1), down)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.fixture(scope="session")
def base(tiny_file: Path) -> dict[str, Tensor]:
    return load_file(tiny_file)


@pytest.fixture
def first(tmp_path: Path, base: dict[str, Tensor]) -> Path:
    return lora(tmp_path / "first.safetensors", base, seed=1, rank=4, alpha=3.0)


@pytest.fixture
def second(tmp_path: Path, base: dict[str, Tensor]) -> Path:
    return lora(tmp_path / "second.safetensors", base, seed=2, rank=2, alpha=1.0)


def test_merging_into_a_checkpoint_adds_each_delta_and_nothing_else(
    first: Path, second: Path, tiny_file: Path, base: dict[str, Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "merged.safetensors"
    merge = Merge(models=[first, second], ratios=[0.5, -2.0], sd_model=tiny_file, save_to=out)

    assert merge.run() == 0

    merged = load_file(out)
    assert merged.keys() == base.keys()
    for name, stored in STORED.items():
        added = 0.5 * delta(first, name) - 2.0 * delta(second, name)
        change = merged[stored] - base[stored]
        if name == TE2_K:
            query, change, value = change.chunk(3)
            assert not query.any()
            assert not value.any()
        torch.testing.assert_close(change, added, atol=2e-5, rtol=1e-5)
    untouched = base.keys() - set(STORED.values())
    assert all(torch.equal(merged[name], base[name]) for name in untouched)


def test_merging_into_a_folder_gives_what_merging_into_the_file_gives(
    first: Path, tiny_folder: Path, base: dict[str, Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "merged"

    assert Merge(models=[first], ratios=[0.5], sd_model=tiny_folder, save_to=out).run() == 0

    pipe = StableDiffusionXLPipeline.from_pretrained(out)
    unet, te2 = pipe.unet.state_dict(), pipe.text_encoder_2.state_dict()
    for name, found in (
        (Q, unet["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"]),
        (CONV, unet["down_blocks.1.resnets.0.conv1.weight"]),
        (TE2_K, te2["text_model.encoder.layers.0.self_attn.k_proj.weight"]),
    ):
        before = base[STORED[name]]
        before = before.chunk(3)[1] if name == TE2_K else before
        expected = before + 0.5 * delta(first, name)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert (out / "tokenizer").is_dir()
    with pytest.raises(UserError, match="is there already"):
        Merge(models=[first], sd_model=tiny_folder, save_to=out).run()
    (tmp_path / "photographs").mkdir()
    with pytest.raises(UserError, match="a folder of something else than a model"):
        Merge(
            models=[first],
            sd_model=tiny_folder,
            save_to=tmp_path / "photographs",
            overwrite=True,
        ).run()


def test_values_that_are_not_finite_are_named_before_anything_is_computed(
    first: Path, tmp_path: Path
) -> None:
    tensors = load_file(first)
    tensors[f"{Q}.lora_up.weight"][0, 0] = float("nan")
    save_file(tensors, first)
    out = tmp_path / "out.safetensors"

    for command in (
        Merge(models=[first], save_to=out),
        Convert(model=first, save_to=out),
        Resize(model=[first], new_rank=2, save_to=out),
    ):
        with pytest.raises(UserError, match=f"not finite, in 1 tensor: {Q}.lora_up.weight"):
            command.run()


@pytest.mark.parametrize("rank", [None, 3])
def test_merging_networks_sums_their_deltas(
    first: Path, second: Path, tmp_path: Path, rank: int | None
) -> None:
    out = tmp_path / "one.safetensors"

    Merge(models=[first, second], ratios=[0.5, -2.0], new_rank=rank, save_to=out).run()

    for name in STORED:
        exact = 0.5 * delta(first, name) - 2.0 * delta(second, name)
        # The best of a rank errs by the singular values behind it (Eckart and Young).
        rest = torch.linalg.svdvals(exact.flatten(1))[rank or 6 :].norm()
        error = (delta(out, name) - exact).norm()
        assert error == pytest.approx(float(rest), rel=1e-3, abs=1e-3)
    assert metadata(out)["ss_network_dim"] == str(rank or 6)
    assert metadata(out)["ss_output_name"] == "first"


@pytest.mark.parametrize("naming", ["diffusers", "omi"])
def test_a_network_survives_a_change_of_its_naming(
    first: Path, tmp_path: Path, naming: str
) -> None:
    other, back = tmp_path / "other.safetensors", tmp_path / "back.safetensors"

    Convert.model_validate({"model": first, "to": naming, "save_to": other}).run()
    Convert(model=other, to="kohya", save_to=back).run()

    assert load_file(first).keys() == load_file(back).keys()
    for name in STORED:
        torch.testing.assert_close(delta(back, name), delta(first, name))


def test_diffusers_computes_with_a_converted_network_as_with_the_merged_weights(
    first: Path, tiny_folder: Path, base: dict[str, Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "diffusers.safetensors"
    # Different ranks: diffusers needs the metadata to scale them.
    mixed = load_file(first)
    up, down = f"{Q}.lora_up.weight", f"{Q}.lora_down.weight"
    mixed |= {up: mixed[up][:, :2].contiguous(), down: mixed[down][:2].contiguous()}
    save_file(mixed, first)
    Convert(model=first, to="diffusers", save_to=out).run()
    unet = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    content = json.loads(metadata(out)["lora_adapter_metadata"])
    unet.load_lora_adapter(
        {n: t for n, t in load_file(out).items() if n.startswith("unet.")},
        prefix="unet",
        metadata=content,
    )

    unet.fuse_lora()

    fused = {n.replace(".base_layer", ""): t for n, t in unet.state_dict().items()}
    for name, path in (
        (Q, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
        (CONV, "down_blocks.1.resnets.0.conv1.weight"),
    ):
        expected = base[STORED[name]] + delta(first, name)
        torch.testing.assert_close(fused[path], expected, atol=2e-5, rtol=1e-5)


def test_lokr_becomes_a_lora_that_says_what_it_lost(
    base: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, columns = shapes(base)[Q]
    w1, w2 = torch.randn(4, 4), torch.randn(rows // 4, columns // 4)
    lokr, out = tmp_path / "lokr.safetensors", tmp_path / "out.safetensors"
    save_file({f"{Q}.lokr_w1": w1, f"{Q}.lokr_w2": w2, f"{Q}.alpha": torch.tensor(1.0)}, lokr)

    with pytest.raises(UserError, match="1 layer of LoKr"):
        Convert(model=lokr, save_to=out).run()
    Convert(model=lokr, save_to=out, new_rank=5).run()

    # Singular values of a Kronecker product are the products of those of its factors.
    values = torch.outer(torch.linalg.svdvals(w1), torch.linalg.svdvals(w2)).flatten()
    values = values.sort(descending=True).values
    error = (delta(out, Q) - torch.kron(w1, w2)).norm()
    assert error == pytest.approx(float(values[5:].norm()), rel=1e-3)
    share = f"{float(values[:5].norm() / values.norm()):.1%}"
    assert f"decomposed deltas keep {share} to {share} of their norms" in capsys.readouterr().out


def with_values(path: Path, base: dict[str, Tensor], values: list[float]) -> Path:
    """A LoRA of one layer whose delta has these singular values."""
    rows, columns = shapes(base)[Q]
    up = (torch.linalg.qr(torch.randn(rows, len(values))).Q * torch.tensor(values)).contiguous()
    down = torch.linalg.qr(torch.randn(columns, len(values))).Q.T.contiguous()
    save_file({f"{Q}.lora_up.weight": up, f"{Q}.lora_down.weight": down}, path)
    return path


@pytest.mark.parametrize(
    ("method", "param", "rank"),
    [
        (None, None, 4),
        ("sv_ratio", 2.5, 2),
        # 16 + 4 of 16 + 4 + 1 + 0.25 + 0.01: a share of 0.970 of the norm, with three of 0.994.
        ("sv_fro", 0.96, 2),
        ("sv_fro", 0.98, 3),
        # 4, 6, 7, 7.5 of 7.6.
        ("sv_cumulative", 0.5, 1),
        ("sv_cumulative", 0.8, 3),
        ("sv_cumulative", 1.0, 4),
    ],
)
def test_resizing_keeps_as_many_singular_values_as_the_method_wants(
    base: dict[str, Tensor], tmp_path: Path, method: str | None, param: float | None, rank: int
) -> None:
    values = [4.0, 2.0, 1.0, 0.5, 0.1]
    given = with_values(tmp_path / "given.safetensors", base, values)
    out = tmp_path / "out.safetensors"
    options = {"model": [given], "new_rank": 4, "save_to": out}

    Resize.model_validate({**options, "dynamic_method": method, "dynamic_param": param}).run()

    kept = torch.linalg.svdvals(
        load_file(out)[f"{Q}.lora_up.weight"] @ load_file(out)[f"{Q}.lora_down.weight"]
    )
    torch.testing.assert_close(kept[:rank], torch.tensor(values[:rank]))
    assert len(load_file(out)[f"{Q}.lora_down.weight"]) == rank
    assert metadata(out)["ss_network_dim"] == str(rank)


def test_extracting_finds_the_network_that_was_merged(
    first: Path, tiny_file: Path, tmp_path: Path
) -> None:
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    Merge(models=[first], sd_model=tiny_file, save_to=tuned).run()

    Extract(
        model_org=tiny_file,
        model_tuned=tuned,
        dim=4,
        conv_dim=4,
        save_to=out,
        save_precision="float",
    ).run()

    assert {key.partition(".")[0] for key in load_file(out)} == set(STORED)
    for name in STORED:
        torch.testing.assert_close(delta(out, name), delta(first, name), atol=1e-4, rtol=1e-3)


def test_all_mistakes_are_told_and_nothing_is_written(first: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Merge(models=[first, tmp_path / "no.safetensors"], ratios=[1.0], save_to=first).run()

    text = str(caught.value)
    assert "is one of the inputs" in text
    assert "has 1 number for 2 networks" in text
    assert "no.safetensors cannot be read" in text


def test_a_dry_run_lists_each_layer_and_writes_nothing(
    first: Path, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"

    for command in (
        Merge(models=[first], sd_model=tiny_file, save_to=out, dry_run=True),
        Merge(models=[first], save_to=out, dry_run=True),
        Convert(model=first, save_to=out, dry_run=True),
        Resize(model=[first], new_rank=2, save_to=out, dry_run=True),
    ):
        assert command.run() == 0
        lines = capsys.readouterr().out.splitlines()
        assert len([line for line in lines if ": " in line]) >= len(STORED)

    assert not out.exists()
