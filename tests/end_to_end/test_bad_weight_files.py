"""Weight files that a run cannot use, as options of training: one line each, before training.

Ids begin with the number of the catalogue of bad inputs that the project was given.
"""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import sdxl_train
from sdxl_train import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from tests.end_to_end.conftest import MakeOptions, StartCommand, TrainLora

Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
FLUX = "lora_unet_double_blocks_0_img_attn_qkv"
SD1 = "lora_unet_down_blocks_0_attentions_0_proj_in"
UNET = "model.diffusion_model."


def lora(name: str = Q, *, rank: int = 4, width: int = 64) -> dict[str, Tensor]:
    return {
        f"{name}.lora_down.weight": torch.ones(rank, width),
        f"{name}.lora_up.weight": torch.ones(width, rank),
        f"{name}.alpha": torch.tensor(2.0),
    }


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/tmp/must-not-be-written", "w"))


LOKR = {f"{Q}.lokr_w1": torch.ones(8, 8), f"{Q}.lokr_w2": torch.ones(8, 8)}
NAN = lora() | {f"{Q}.lora_up.weight": torch.full((64, 4), float("nan"))}
INF = lora() | {f"{Q}.alpha": torch.tensor(float("inf"))}
BAD_NETWORKS: dict[str, tuple[bytes | None, str]] = {
    "61-absent": (None, "cannot be read: No such file"),
    "62-zero-bytes": (b"", "is empty (0 bytes)"),
    "62-truncated": (save(lora())[:-5], "is truncated"),
    "62-login-page": (b"<!DOCTYPE html><html>Log in</html>", "is a web page"),
    "63-pickle-of-code": (pickle.dumps(_Payload(), protocol=2), "never unpickled"),
    "64-pickle-renamed": (pickle.dumps({"a": 1}, protocol=2), "a pickle named .safetensors"),
    "65-no-network": (save({"decoder.conv_in.weight": torch.ones(2, 4, 3, 3)}), "is a VAE alone"),
    "74-flux": (save(lora(FLUX)), "is a network for Flux, not for SDXL"),
    "74-sd1": (save(lora(SD1)), "is a network for Stable Diffusion 1.x, not for SDXL"),
    "77-keys-of-no-layer": (
        save({**lora(), "lora_unet_what.lora_up.weight": torch.ones(1, 1)}),
        "keys that belong to no layer of SDXL, 1 tensor: lora_unet_what.lora_up.weight",
    ),
    "78-nan": (save(NAN), f"not finite, in 1 tensor: {Q}.lora_up.weight"),
    "78-infinite-alpha": (save(INF), f"not finite, in 1 tensor: {Q}.alpha"),
    "78-zero-size": (
        save(lora() | {f"{Q}.lora_up.weight": torch.ones(64, 0)}),
        "lora_up.weight has no elements",
    ),
    "78-ranks-differ": (
        save(lora() | {f"{Q}.lora_up.weight": torch.ones(64, 3)}),
        "do not fit together",
    ),
    "78-other-width": (save(lora(width=32)), "[32, 32]"),
}
ONLY_TO_BEGIN: dict[str, tuple[bytes | None, str]] = {
    "72-rank": (save(lora(rank=8)), "set the rank and what else shapes the factors"),
    "72-alpha": (save(lora() | {f"{Q}.alpha": torch.tensor(1.0)}), "set alpha and rank to those"),
    "73-lokr-into-lora": (save(LOKR), "bad.safetensors is LoKr, and this run trains LoRA"),
    "73-dora-into-lora": (
        save({**lora(), f"{Q}.dora_scale": torch.ones(1, 64)}),
        "bad.safetensors is DoRA, and this run trains LoRA",
    ),
}


def problem_of(options: dict[str, Any]) -> str:
    """Give the one problem of a plan, as one line."""
    with pytest.raises(UserError) as caught:
        sdxl_train.plan(options)
    (problem,) = caught.value.problems
    assert "\n" not in problem.message
    return f"{problem.place}: {problem.message} -> {problem.remedy}"


@pytest.mark.parametrize("option", ["network_weights", "base_weights"])
@pytest.mark.parametrize("case", BAD_NETWORKS)
def test_bad_network_is_told_in_one_line(
    option: str, case: str, options: MakeOptions, tmp_path: Path
) -> None:
    content, expected = BAD_NETWORKS[case]
    path = tmp_path / ("bad.ckpt" if case.startswith("63") else "bad.safetensors")
    if content is not None:
        path.write_bytes(content)

    told = problem_of(options(**{option: str(path)}))

    if case == "78-other-width" and option == "network_weights":
        expected = f"{Q}.lora_down.weight with [4, 32]"
    assert expected in told
    assert "bad." in told or option in told
    assert not Path("/tmp/must-not-be-written").exists()


@pytest.mark.parametrize("case", ONLY_TO_BEGIN)
def test_network_that_does_not_fit_the_run_is_told_in_one_line(
    case: str, options: MakeOptions, tmp_path: Path
) -> None:
    content, expected = ONLY_TO_BEGIN[case]
    assert content is not None
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)

    told = problem_of(options(network_weights=str(path)))

    assert expected in told
    assert "network_weights" in told


def without(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda given: {n: t for n, t in given.items() if not n.startswith(prefix)}


def spoiled(name: str, value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(given: dict[str, Tensor]) -> dict[str, Tensor]:
        tensor = given[name].clone()
        tensor.view(-1)[-1] = value
        return {**given, name: tensor}

    return change


STEM, OUT = f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.weight"
INPAINT = {STEM: torch.ones(32, 9, 3, 3)}
PLANNED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "65-inpainting": (lambda given: given | INPAINT, "an inpainting model (9 input channels)"),
    "65-lora": (lambda _: lora(), "is a LoRA or another network"),
    "66-no-vae": (without("first_stage_model."), "without its VAE -> give one with --vae"),
    "66-no-encoder": (without("conditioner.embedders.1."), "without its text encoder 2"),
    "67-keys-missing": (without(f"{UNET}middle_block.0."), "middle_block.0.emb_layers.1.bias, "),
    "67-one-key-missing": (without(OUT), f"the U-Net lacks 1 tensor: {OUT}"),
}
NOT_FINITE: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "68-nan": (spoiled(STEM, float("nan")), "U-Net conv_in.weight"),
    "68-inf": (
        spoiled("first_stage_model.decoder.conv_out.bias", float("inf")),
        "VAE decoder.conv_out.bias",
    ),
}


@pytest.mark.parametrize("case", PLANNED)
def test_bad_checkpoint_is_told_in_one_line(
    case: str, options: MakeOptions, tiny_file: Path, tmp_path: Path
) -> None:
    change, expected = PLANNED[case]
    path = tmp_path / "bad.safetensors"
    save_file(change(load_file(tiny_file)), path)

    assert expected in problem_of(options(pretrained_model_name_or_path=str(path)))


@pytest.mark.parametrize("case", NOT_FINITE)
def test_checkpoint_with_values_that_are_not_finite_is_refused_before_the_first_step(
    case: str, options: MakeOptions, tiny_file: Path, tmp_path: Path
) -> None:
    change, expected = NOT_FINITE[case]
    path = tmp_path / "bad.safetensors"
    save_file(change(load_file(tiny_file)), path)
    chosen = options(pretrained_model_name_or_path=str(path))

    with pytest.raises(UserError) as caught:
        sdxl_train.train(chosen)

    (problem,) = caught.value.problems
    assert f"are not finite as float32, in 1 tensor: {expected}" in problem.message
    assert not list(Path(chosen["output_dir"]).glob("photo*"))


def test_extra_keys_of_a_checkpoint_are_counted_67(
    options: MakeOptions, tiny_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "more.safetensors"
    save_file({**load_file(tiny_file), "strange.weight": torch.ones(1)}, path)

    sdxl_train.plan(options(pretrained_model_name_or_path=str(path)))

    assert "unknown tensors, which are not used: 1 tensor: strange.weight" in caplog.text


def test_prediction_type_of_a_marker_is_taken_and_only_forced_away_70(
    options: MakeOptions, tiny_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "v.safetensors"
    save_file({**load_file(tiny_file), "v_pred": torch.zeros(1)}, path)
    chosen = options(pretrained_model_name_or_path=str(path))

    caplog.set_level(logging.INFO, "sdxl_train")
    sdxl_train.plan(chosen)
    assert "the model predicts v_prediction (its marker v_pred)" in caplog.text
    forced = sdxl_train.plan({**chosen, "v_parameterization": False})

    assert [text for text in forced.warnings if "its marker v_pred says v_prediction" in text]


def test_base_model_that_changed_before_resuming_is_refused_71(
    train_lora: TrainLora, tiny_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(tiny_file.read_bytes())
    first = train_lora(
        pretrained_model_name_or_path=str(path), max_train_steps=1, save_state_on_train_end=True
    )
    save_file(spoiled(OUT, 0.5)(load_file(tiny_file)), path)

    with pytest.raises(UserError, match="resume with the base model of the state"):
        train_lora(**{**first.options, "max_train_steps": 2, "resume": "latest"})


def test_a_bad_file_ends_the_command_with_2_and_no_traceback(
    options: MakeOptions, start_command: StartCommand, tmp_path: Path
) -> None:
    (tmp_path / "empty.safetensors").write_bytes(b"")

    command = start_command(options(network_weights=str(tmp_path / "empty.safetensors")))
    _, told = command.communicate()

    assert command.returncode == 2
    assert "empty.safetensors is empty (0 bytes)" in told
    assert "Traceback" not in told
