"""Options: what is accepted, what is refused, and what the help and the record say."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from lycoris.config import PRESET
from pydantic import ValidationError

from sdxl_train_lycoris.networks import (
    LINEAR_PRESETS,
    Kohya,
    Loha,
    Lokr,
    Lora,
    Preset,
)


def complaints(network: Any) -> dict[str, str]:
    """Give the complaints of the preflight by place."""
    config: Any = SimpleNamespace(place=lambda name: f"--{name}")
    return {problem.place: problem.message for problem in network.check(config)}


def test_entry_point_registers_every_network() -> None:
    (entry,) = entry_points(group="sdxl_train", name="lycoris")
    assert entry.load().register_networks() == {
        "lycoris.kohya": Kohya,
        "lora": Lora,
        "locon": Lora,
        "loha": Loha,
        "lokr": Lokr,
    }


def test_importing_the_plugin_imports_neither_torch_nor_lycoris() -> None:
    code = (
        "import sdxl_train_lycoris, sys; "
        "print([name for name in ('torch', 'lycoris') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_presets_are_those_of_the_library() -> None:
    # The preset ia3 belongs to an algorithm that is not here.
    assert set(get_args(Preset)) == PRESET.keys() - {"ia3"}
    without = {name for name, preset in PRESET.items() if not preset["enable_conv"]}
    assert without - {"ia3"} == LINEAR_PRESETS


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 4},
        {"train_norm": True},
        {"block_dims": "1,2"},
        {"algo": "glora"},
        {"preset": "ia3"},
        {"rank_dropout": 1.0},
        {"conv_dim": -1},
        {"algo": "lokr", "factor": -2},
    ],
)
def test_what_is_not_supported_is_refused(options: dict[str, Any]) -> None:
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
        ({"bypass_mode": True, "rank_dropout": 0.1, "rank_dropout_scale": True},
         "rank_dropout_scale"),
        ({"algo": "lokr", "factor": 0}, "factor"),
        ({"algo": "lokr", "bypass_mode": True, "rank_dropout": 0.1}, "rank_dropout"),
        ({"algo": "lokr", "full_matrix": True, "decompose_both": True}, "decompose_both"),
        ({"algo": "lokr", "full_matrix": True, "rs_lora": True}, "rs_lora"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(options: dict[str, Any], option: str) -> None:
    assert list(complaints(Kohya(**options))) == [f"--network_args.{option}"]


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
