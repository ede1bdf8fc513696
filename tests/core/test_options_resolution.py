"""Every option has a consumer, or the run refuses it and says whose it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sdxl_train import api
from sdxl_train.errors import UserError

if TYPE_CHECKING:
    from sdxl_train.resolve import Resolution
    from tests.core.conftest import Resolve, Site

NETWORK = """
from sdxl_train import Field, Loss, Network, hookimpl

class Rings(Network):
    \"\"\"Rings, for tests.\"\"\"
    rings: int = Field(3, ge=1, description="Number of rings.")
    tokens: str | None = None
    def build(self, model): ...

class Robust(Loss):
    \"\"\"Robust, for tests.\"\"\"
    robust_c: float = 0.1
    def build(self, schedule): ...

class Greedy(Loss):
    \"\"\"Takes an option of the framework.\"\"\"
    seed: int = 0
    def build(self, schedule): ...

@hookimpl
def register_networks():
    return {"rings": Rings}

@hookimpl
def register_losses():
    return {"robust": Robust, "greedy": Greedy}
"""


def _problems(resolution: Resolution) -> list[str]:
    return [str(problem) for problem in resolution.problems]


def test_args_reach_their_component(site: Site, resolve: Resolve) -> None:
    site.add("round", NETWORK)

    line = "--network_module rings --network_dim 2 --network_args rings=5 tokens='a=b,c'"
    resolution = resolve(*line.split())

    assert _problems(resolution) == []
    assert resolution.config is not None
    assert resolution.config.network.model_dump() == {
        "network_dim": 2,
        "network_alpha": 1.0,
        "network_dropout": None,
        "network_weights": None,
        "base_weights": None,
        "base_weights_multiplier": None,
        "rings": 5,
        "tokens": "a=b,c",
    }
    assert resolution.config.options()["network_args.rings"] == {
        "value": 5,
        "origin": "command line",
    }


def test_an_option_of_args_given_as_a_flag_is_explained(site: Site, resolve: Resolve) -> None:
    site.add("round", NETWORK)

    resolution = resolve("--network_module", "rings", "--rings", "5")

    assert _problems(resolution) == [
        "--rings: is an option of network rings\n    -> write --network_args rings=..."
    ]


def test_a_flag_given_among_args_is_explained(resolve: Resolve) -> None:
    resolution = resolve("--network_args", "network_dim=8", "dim=8")

    first, second = _problems(resolution)
    assert first == (
        "--network_args network_dim: network_dim is an option of its own\n"
        "    -> write --network_dim"
    )
    assert second.startswith("--network_args dim: network lora has no option 'dim'")


def test_an_option_of_an_unused_component_is_explained(site: Site, resolve: Resolve) -> None:
    site.add("round", NETWORK)

    resolution = resolve("--plugin", "round", "--robust_c", "1")

    assert _problems(resolution) == [
        "--robust_c: is an option of loss robust, which this run does not use\n"
        "    -> add --loss_type robust, or leave it out"
    ]


def test_an_option_of_a_plugin_that_is_not_enabled_is_explained(
    site: Site, resolve: Resolve
) -> None:
    site.add("grain")

    resolution = resolve("--grain", "0.5")

    assert _problems(resolution) == [
        "--grain: is an option of noise grain, of plugin 'grain', which is not enabled\n"
        "    -> add --plugin grain"
    ]


def test_an_unknown_option_names_the_nearest_one(resolve: Resolve) -> None:
    first, second = _problems(resolve("--learning-rat", "1", "--qqq", "1"))

    assert first == "--learning-rat: unknown option\n    -> did you mean learning_rate?"
    assert second.startswith("--qqq: unknown option")


def test_abbreviations_are_not_taken(resolve: Resolve) -> None:
    (problem,) = _problems(resolve("--text_encoder", "1e-5"))

    assert problem.startswith("--text_encoder: unknown option")


def test_hyphens_are_underscores(resolve: Resolve) -> None:
    resolution = resolve("--network-dim=8", "--max-train-steps", "3")

    assert _problems(resolution) == []
    assert resolution.config is not None
    assert resolution.config.network.network_dim == 8
    assert resolution.config.training.max_train_steps == 3


def test_the_last_of_two_equal_flags_wins_and_is_stated(resolve: Resolve) -> None:
    resolution = resolve("--seed", "1", "--seed", "2")

    assert resolution.config is not None
    assert resolution.config.training.seed == 2
    assert "--seed is given twice: '2' wins over '1'" in resolution.notices


def test_two_owners_of_one_option_are_refused(site: Site, resolve: Resolve) -> None:
    site.add("round", NETWORK)

    (problem,) = _problems(resolve("--loss_type", "greedy"))

    assert problem.startswith(
        "--seed: is an option of both sdxl-train itself and loss round:greedy"
    )


def test_a_stacked_component_is_active_by_name_too(site: Site, resolve: Resolve) -> None:
    site.add("grain")

    resolution = resolve("--noise", "grain", "--noise", "noise-offset", "--noise_offset", "0.1")

    assert _problems(resolution) == []
    assert resolution.config is not None
    assert [type(noise).__name__ for noise in resolution.config.noises] == ["NoiseOffset", "Grain"]


def test_an_enabled_plugin_that_the_run_does_not_use_is_noted(site: Site, resolve: Resolve) -> None:
    site.add("grain")

    resolution = resolve("--plugin", "grain")

    assert resolution.notices == [
        "plugin 'grain' is enabled, but the run uses none of its components"
    ]


def test_a_name_like_no_other_is_told_with_where_to_look(resolve: Resolve) -> None:
    (text,) = _problems(resolve("--optimizer_type", "zzzz"))

    assert "no optimizer is called 'zzzz'; `sdxl-train components optimizer` lists" in text


def test_a_wrong_component_name_is_told_with_all_else_that_is_wrong(resolve: Resolve) -> None:
    line = "--network_module lorra --lr_scheduler cosin --seed -1 --optimizer_type Adm"
    texts = _problems(resolve(*line.split()))

    assert len(texts) == 4
    assert any("no network is called 'lorra'; did you mean lora?" in text for text in texts)
    assert any("no scheduler is called 'cosin'; did you mean cosine?" in text for text in texts)
    assert any("no optimizer is called 'Adm'; did you mean Adam?" in text for text in texts)
    assert any(text.startswith("--seed: '-1' is not a whole number") for text in texts)


def test_blocking_the_builtin_plugin_says_what_is_missing(resolve: Resolve) -> None:
    texts = _problems(resolve("--plugin", "no:sdxl-lora"))

    assert "--model_type: is required: no enabled plugin has a default model" in texts


def test_python_names_no_file_of_options() -> None:
    with pytest.raises(UserError, match="option config_file: is for the command line only"):
        api.plan({"config_file": "run.toml"})


def test_python_takes_the_same_options_and_tells_the_same() -> None:
    with pytest.raises(UserError) as caught:
        api.plan({"seed": "1", "learnin_rate": 1e-4, "network_args": {"dims": 4}})

    texts = [str(problem) for problem in caught.value.problems]
    assert 'option seed: "1" is not a whole number >= 0; write it without quotes' in texts
    assert any(text.startswith("option learnin_rate: unknown option") for text in texts)
    assert any(text.startswith("option network_args.dims: network lora has") for text in texts)
