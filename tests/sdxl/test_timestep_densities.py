"""Timestep distributions: what is drawn has the density of the formula, cut to the range."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdxl_lora_plugins import register_timesteps
from sdxl_train import NoiseSchedule, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from sdxl_train import Problem

DISTRIBUTIONS: dict[str, Any] = dict(register_timesteps())
DRAWS = 100_000
SCHEDULE = NoiseSchedule.scaled_linear()

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "uniform": [{}],
    "logit-normal": [{}, {"logit_mean": 1.0, "logit_std": 0.5}],
    "cosine": [{}],
    "sigmoid": [{}, {"sigmoid_bias": -3.0}],
    "table": [{"timestep_weights": [1.0, 0.0, 3.0]}],
}
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]


def densities(name: str, options: dict[str, Any], schedule: NoiseSchedule) -> list[float]:
    """The probability of each timestep up to a factor, from the formula in plain Python."""
    abar = schedule.alphas_cumprod.double().tolist()
    if name == "logit-normal":
        normal = NormalDist(options.get("logit_mean", 0.0), options.get("logit_std", 1.0))
        logits = [-math.inf, *(math.log(t / (1000 - t)) for t in range(1, 1000)), math.inf]
        cdf = [0.0, *(normal.cdf(logit) for logit in logits[1:-1]), 1.0]
        return [high - low for low, high in itertools.pairwise(cdf)]
    if name == "cosine":
        angle = [math.acos(math.sqrt(a)) for a in abar]
        inner = [(after - before) / 2 for before, after in zip(angle, angle[2:], strict=False)]
        return [angle[1] - angle[0], *inner, angle[-1] - angle[-2]]
    if name == "sigmoid":
        bias = options.get("sigmoid_bias", 0.0)
        # sigmoid(b - log SNR) = 1 / (1 + SNR e^-b)
        return [1 / (1 + a / (1 - a) * math.exp(-bias)) for a in abar]
    if name == "table":
        weights = options["timestep_weights"]
        return [weights[t * len(weights) // 1000] for t in range(1000)]
    return [1.0] * 1000


def drawn(name: str, schedule: NoiseSchedule = SCHEDULE, **options: Any) -> torch.Tensor:
    sample = DISTRIBUTIONS[name](**options).build(schedule)
    timesteps: torch.Tensor = sample(DRAWS, torch.Generator().manual_seed(5))
    assert timesteps.dtype == torch.int64
    return timesteps


def assert_distributed(timesteps: torch.Tensor, weights: list[float]) -> None:
    """Pearson's chi-squared test over 40 bins of about equal probability."""
    expected = torch.tensor(weights, dtype=torch.float64)
    expected = expected / expected.sum() * len(timesteps)
    found = torch.bincount(timesteps, minlength=len(weights)).double()
    assert not found[expected == 0].any()
    bins = (expected.cumsum(0) / len(timesteps) * 40).long().clamp(max=39)
    e = torch.zeros(40, dtype=torch.float64).index_add_(0, bins, expected)
    o = torch.zeros(40, dtype=torch.float64).index_add_(0, bins, found)
    filled = e > 0
    # With 39 degrees of freedom it exceeds 72.1 once in a thousand times.
    assert float(((o - e).square() / e.where(filled, 1))[filled].sum()) < 72.1


@pytest.mark.parametrize(("name", "options"), CASES)
def test_drawn_timesteps_have_the_density_of_the_formula(
    name: str, options: dict[str, Any]
) -> None:
    assert_distributed(drawn(name, **options), densities(name, options, SCHEDULE))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_range_keeps_the_proportions_within_it(name: str, options: dict[str, Any]) -> None:
    timesteps = drawn(name, min_timestep=200, max_timestep=700, **options)
    whole = densities(name, options, SCHEDULE)
    assert_distributed(timesteps, [w if 200 <= t < 700 else 0.0 for t, w in enumerate(whole)])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_density_follows_the_schedule_of_zero_terminal_snr(
    name: str, options: dict[str, Any]
) -> None:
    schedule = SCHEDULE.with_zero_terminal_snr()
    assert_distributed(drawn(name, schedule, **options), densities(name, options, schedule))


def test_a_wrong_density_is_noticed() -> None:
    with pytest.raises(AssertionError):
        assert_distributed(drawn("logit-normal"), densities("cosine", {}, SCHEDULE))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_draws_depend_on_the_generator_alone(name: str, options: dict[str, Any]) -> None:
    first = drawn(name, **options)
    torch.manual_seed(99)
    assert torch.equal(drawn(name, **options), first)


@pytest.mark.parametrize("text", ["1 0\n3", "1, 0, 3\n", "[1, 0, 3]", "\ufeff1.0\r\n0\r\n3e0\r\n"])
def test_table_from_a_file_equals_the_one_in_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "weights.txt"
    path.write_text(text, encoding="utf-8")
    inline = drawn("table", timestep_weights=[1.0, 0.0, 3.0])
    assert torch.equal(drawn("table", timestep_weights_file=path), inline)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1 two 3", "could not convert string to float: 'two'"),
        ("", "it holds no numbers"),
        ("[1, [2], 3]", "could not convert"),
        ("[1, 2", "Expecting"),
        ("1 -2 3", "-2.0 is no weight"),
        ("1 nan 3", "nan is no weight"),
        ("0 0", "no weight above 0"),
        (None, "No such file"),
    ],
)
def test_table_that_cannot_serve_is_refused(
    tmp_path: Path, text: str | None, complaint: str
) -> None:
    path = tmp_path / "weights.txt"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    (problem,) = problems(timestep_weights_file=path)
    assert problem.place == "--timestep_weights_file"
    assert complaint in problem.message


def test_table_is_asked_for_once() -> None:
    for options, what in (
        ({}, "both missing"),
        ({"timestep_weights": [1.0], "timestep_weights_file": "x"}, "both given"),
    ):
        (problem,) = problems(**options)
        assert what in problem.message
        assert problem.place == "--timestep_weights, --timestep_weights_file"


def problems(**options: Any) -> list[Problem]:
    config: Any = SimpleNamespace(place=lambda name: f"--{name}", is_set=lambda name: False)
    return list(DISTRIBUTIONS["table"](**options).check(config))


def test_table_longer_than_the_schedule_is_refused() -> None:
    with pytest.raises(UserError, match="1001 weights for 1000 timesteps"):
        drawn("table", timestep_weights=[1.0] * 1001)


def test_range_without_any_weight_is_refused() -> None:
    with pytest.raises(UserError, match="none of the timesteps 400 to 599 has any weight"):
        drawn("table", timestep_weights=[1, 1, 0, 1, 1], min_timestep=400, max_timestep=600)


def test_logit_normal_mean_and_deviation_move_it() -> None:
    middle = drawn("logit-normal").double() / 1000
    later = drawn("logit-normal", logit_mean=1.0).double() / 1000
    narrow = drawn("logit-normal", logit_std=0.2).double() / 1000
    # The median of sigmoid(z) is the sigmoid of the median of z.
    assert float(middle.median()) == pytest.approx(0.5, abs=0.005)
    assert float(later.median()) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.005)
    assert float(narrow.std()) < float(middle.std()) / 3
