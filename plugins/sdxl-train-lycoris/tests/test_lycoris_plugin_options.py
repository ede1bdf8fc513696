"""Options: what is accepted, what is refused, and what the help and the record say."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from lycoris.config import PRESET
from pydantic import ValidationError

from sdxl_train_lycoris.networks import ALGORITHMS, Kohya, Loha, Lokr, Lora
from sdxl_train_lycoris.presets import BUILTIN_PRESETS, LINEAR_PRESETS

if TYPE_CHECKING:
    from pathlib import Path


SDXL_BLOCKS = (
    "time_embed",
    *(f"input_{index}" for index in range(9)),
    *(f"middle_{index}" for index in range(3)),
    *(f"output_{index}" for index in range(9)),
    "out",
)


def complaints(network: Any) -> dict[str, str]:
    """Give the complaints of the preflight by place."""
    model = SimpleNamespace(block_names=lambda: SDXL_BLOCKS)
    config: Any = SimpleNamespace(place=lambda name: f"--{name}", model=model)
    return {problem.place: problem.message for problem in network.check(config)}


def test_entry_point_registers_every_network() -> None:
    (entry,) = entry_points(group="sdxl_train", name="lycoris")
    assert entry.load().register_networks() == {"lycoris.kohya": Kohya, **ALGORITHMS}


def test_every_algorithm_of_the_library_is_there() -> None:
    from lycoris.wrapper import network_module_dict

    # T-LoRA needs to know the timestep; it is newer than the others.
    assert set(ALGORITHMS) == set(network_module_dict) - {"tlora"}


def test_importing_the_plugin_imports_neither_torch_nor_lycoris() -> None:
    code = (
        "import sdxl_train_lycoris, sys; "
        "print([name for name in ('torch', 'lycoris') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_presets_are_those_of_the_library() -> None:
    assert set(BUILTIN_PRESETS) == PRESET.keys()
    assert {name for name, preset in PRESET.items() if not preset["enable_conv"]} == LINEAR_PRESETS


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 0},
        {"train_t5xxl": True},
        {"block_dims": "1,x"},
        {"algo": "tlora"},
        {"constraint": -1},
        {"rank_dropout": 1.0},
        {"conv_dim": -1},
        {"algo": "lokr", "factor": -2},
        {"train_norm": "maybe"},
        {"loraplus_lr_ratio": 0},
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Kohya(**options)


@pytest.mark.parametrize("network", [Loha, Lora])
def test_an_algorithm_has_only_its_own_options(network: Any) -> None:
    with pytest.raises(ValidationError):
        network(factor=8)


def test_kohya_names_the_owners_of_foreign_options() -> None:
    assert complaints(Kohya(algo="loha", factor=8, use_tucker=True)) == {
        "--network_args.factor": "is not an option of algo=loha, only of lokr"
    }
    assert complaints(Kohya(algo="lokr", use_tucker=True, factor=8)) == {
        "--network_args.use_tucker": "is not an option of algo=lokr, only of lora, locon, loha"
    }


def test_kohya_chooses_lora_where_no_algo_is_given() -> None:
    assert isinstance(Kohya(network_dim=8).chosen, Lora)
    assert isinstance(Kohya(algo="LoKr").chosen, Lokr)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"dropout": 0.1, "network_dropout": 0.2}, "dropout"),
        ({"dora_wd": True, "weight_decompose": False}, "weight_decompose"),
        ({"rank_dropout_scale": True}, "rank_dropout_scale"),
        ({"wd_on_output": True}, "wd_on_output"),
        ({"dora_wd": True, "bypass_mode": True}, "bypass_mode"),
        ({"dora_wd": True, "network_dropout": 0.1}, "dora_wd"),
        ({"preset": "attn-mlp", "conv_dim": 4}, "conv_dim"),
        ({"preset": "attn-only", "use_tucker": True}, "use_tucker"),
        ({"conv_dim": 0, "conv_alpha": 1.0}, "conv_alpha"),
        ({"algo": "lokr", "factor": 0}, "factor"),
        ({"algo": "full", "bypass_mode": True}, "bypass_mode"),
        ({"algo": "dylora", "network_dim": 4, "block_size": 3}, "network_dim"),
        ({"algo": "dylora", "network_dim": 3, "block_size": 3, "block_dims": "middle=4"},
         "block_dims"),
        ({"algo": "ia3", "block_dims": "middle=4"}, "block_dims"),
        ({"algo": "boft", "conv_alpha": 1}, "conv_alpha"),
        ({"preset": "no-such"}, "preset"),
        ({"algo": "lokr", "full_matrix": True, "decompose_both": True}, "decompose_both"),
        ({"algo": "lokr", "full_matrix": True, "rs_lora": True}, "rs_lora"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(options: dict[str, Any], option: str) -> None:
    place = option if option == "network_dim" else f"network_args.{option}"
    assert list(complaints(Kohya(**options))) == [f"--{place}"]


def test_blocks_are_counted_as_23_or_as_the_25_of_sd1() -> None:
    said: list[str] = []
    config: Any = SimpleNamespace(
        place=lambda name: f"--{name}",
        is_set=lambda name: False,
        model=SimpleNamespace(block_names=lambda: SDXL_BLOCKS),
    )
    for count in (23, 25):
        network = Lora(block_dims=[4] * count, block_alphas=",".join(["2"] * count))
        said = list(network.remarks(config))
        assert len(said) == (0 if count == 23 else 2)
    absent = "input_9, input_10, input_11, output_9, output_10, output_11"
    assert absent in said[0]
    (problem,) = Lora(block_alphas=[1.0] * 24).check(config)
    assert "24 values, expected 23, one for each of time_embed" in problem.message
    (problem,) = Lora(block_dims="midle=4").check(config)
    assert "there is no 'midle'; close are middle" in problem.message


def test_preset_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for text, place, message in (
        ("enable_conv = true\ntarget_module = ['X']", f"{path}:2", "'target_module' is no key"),
        ("enable_conv = 'perhaps'", f"{path}:1", "enable_conv: Input should be"),
        ("enable_conv = ", f"{path}:1:15", "Invalid value"),
        ("[module_algo_map.CrossAttention]\nalgo = 'loras'", "", "there is no algo loras"),
        ("[name_algo_map.to_k]\nalgo = 'loha'\nfactor = 4", "", "to_k: factor: Extra inputs"),
    ):
        path.write_text(text)
        ((found, said),) = complaints(Lora(preset=str(path))).items()
        assert found == f"--network_args.preset{', ' if place else ''}{place}"
        assert message in said
    ((_, said),) = complaints(Lora(preset=str(tmp_path / "no.toml"))).items()
    assert "cannot be read" in said


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"algo": "full"}, ["network_dim", "network_alpha"]),
        ({"algo": "ia3"}, ["network_dim", "network_alpha"]),
        ({"algo": "boft"}, ["network_alpha"]),
        ({"algo": "lokr", "full_matrix": True}, ["network_dim", "network_alpha"]),
        ({"algo": "lokr"}, []),
        ({"use_reentrant": True}, ["network_args.use_reentrant"]),
    ],
)
def test_idle_options_of_usual_commands_are_remarked_on(
    options: dict[str, Any], idle: list[str]
) -> None:
    config: Any = SimpleNamespace(place=str, is_set=lambda name: True)
    said = list(Kohya(**options).remarks(config))
    assert [line.partition(" ")[0] for line in said] == idle


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "attn-mlp", "use_tucker": False},
        {"conv_dim": 0},
        {"dropout": 0.1, "network_dropout": 0.1},
        {"weight_decompose": True, "wd_on_output": True},
        {"algo": "lokr", "factor": 8, "decompose_both": True, "conv_dim": 4, "conv_alpha": 1},
    ],
)
def test_options_that_go_together_pass(options: dict[str, Any]) -> None:
    assert complaints(Kohya(**options)) == {}


def test_record_names_the_algorithm_and_what_was_set() -> None:
    lokr = Lokr(network_dim=8, factor=4, full_matrix=True)
    assert json.loads(lokr.args()) == {"algo": "lokr", "factor": "4", "full_matrix": "True"}
