"""Noise transforms against their formulas and the statistics that follow from them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from sdxl_lora_plugins import register_noises
from sdxl_lora_plugins.assignment import cheapest_assignment
from sdxl_train import NoiseSchedule

if TYPE_CHECKING:
    from sdxl_train import Problem, RunConfig

NOISES: dict[str, Any] = dict(register_noises())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def applied(
    name: str, noise: torch.Tensor, latents: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    before = noise.clone()
    transform = NOISES[name](**options).build(NoiseSchedule.scaled_linear())
    latents = torch.zeros_like(noise) if latents is None else latents
    after: torch.Tensor = transform(noise, latents, torch.zeros(len(noise)).long(), generator(9))
    assert torch.equal(noise, before), "the transform changed its input"
    assert after.shape == noise.shape
    assert after.dtype == torch.float32
    return after


def problems(name: str, **options: Any) -> list[Problem]:
    config: RunConfig | Any = SimpleNamespace(
        place=lambda name: f"--{name}", is_set=lambda name: False
    )
    return list(NOISES[name](**options).check(config))


def test_random_offset_strength_is_one_number_for_the_batch() -> None:
    noise = torch.randn(3, 4, 5, 5, generator=generator())
    fixed = applied("noise-offset", noise, noise_offset=0.1) - noise
    random = (
        applied("noise-offset", noise, noise_offset=0.1, noise_offset_random_strength=True) - noise
    )
    ratio = random / fixed
    assert 0 < float(ratio.mean()) < 1
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [0.05, -0.2])
def test_adaptive_offset_grows_with_the_mean_of_the_channel(scale: float) -> None:
    noise = torch.randn(2, 4, 5, 5, generator=generator())
    latents = torch.randn(2, 4, 5, 5, generator=generator(1)) + torch.arange(4).view(1, 4, 1, 1)
    plain = applied("noise-offset", noise, latents, noise_offset=0.1) - noise
    adaptive = (
        applied("noise-offset", noise, latents, noise_offset=0.1, adaptive_noise_scale=scale)
        - noise
    )
    mean = latents.mean(dim=(2, 3), keepdim=True).abs()
    strength = (0.1 + scale * mean).clamp(min=0)
    torch.testing.assert_close(adaptive, plain / 0.1 * strength, rtol=1e-3, atol=1e-5)


def test_multires_noise_follows_its_formula() -> None:
    noise = torch.randn(2, 4, 12, 9, generator=generator())
    found = applied("multires", noise, multires_noise_iterations=6, multires_noise_discount=0.4)

    draw = generator(9)
    ratios = 2 + 2 * torch.rand(6, generator=draw)
    expected = noise.clone()
    for i in range(6):
        height, width = (max(1, int(side / float(ratios[i]) ** i)) for side in (12, 9))
        coarse = torch.randn(2, 4, height, width, generator=draw)
        expected += 0.4**i * F.interpolate(coarse, size=(12, 9), mode="bilinear")
        if height == 1 or width == 1:
            break
    torch.testing.assert_close(found, expected / expected.std())


def test_multires_noise_has_unit_deviation_and_neighbours_alike() -> None:
    noise = torch.randn(8, 4, 32, 32, generator=generator())
    found = applied("multires", noise, multires_noise_iterations=8, multires_noise_discount=0.8)
    assert float(found.std()) == pytest.approx(1, abs=1e-4)

    def correlation(field: torch.Tensor) -> float:
        return float((field[..., 1:] * field[..., :-1]).mean() / field.square().mean())

    # 8 * 4 * 32 * 31 products of independent numbers average to 0 within 4 / sqrt(31 744).
    assert abs(correlation(noise)) < 4 / 31_744**0.5
    assert correlation(found) > 0.2


def test_input_perturbation_is_not_predicted() -> None:
    assert NOISES["input-perturbation"].phase == "input"
    noise = torch.randn(2, 4, 3, 3, generator=generator())
    found = applied("input-perturbation", noise, ip_noise_gamma=0.1)
    extra = torch.randn(2, 4, 3, 3, generator=generator(9))
    torch.testing.assert_close(found, noise + 0.1 * extra)


def test_random_perturbation_is_a_share_of_the_full_one() -> None:
    noise = torch.zeros(2, 4, 16, 16)
    fixed = applied("input-perturbation", noise, ip_noise_gamma=0.3)
    random = applied(
        "input-perturbation", noise, ip_noise_gamma=0.3, ip_noise_gamma_random_strength=True
    )
    share = random / fixed
    assert 0 < float(share.mean()) < 1
    torch.testing.assert_close(share, share.mean().expand_as(share))


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_assignment_is_the_cheapest_of_all(size: int) -> None:
    for seed in range(20):
        costs = torch.rand(size, size, generator=generator(seed)).tolist()
        columns = cheapest_assignment(costs)
        assert sorted(columns) == list(range(size))
        cost = sum(costs[row][column] for row, column in enumerate(columns))
        best = min(
            sum(costs[row][column] for row, column in enumerate(order))
            for order in itertools.permutations(range(size))
        )
        assert cost == pytest.approx(best)


def test_immiscible_noise_deals_out_the_same_noises_nearer() -> None:
    noise = torch.randn(6, 4, 2, 2, generator=generator())
    latents = torch.randn(6, 4, 2, 2, generator=generator(1))
    found = applied("immiscible", noise, latents, immiscible_noise=True)
    assert {row.sum().item() for row in found} == {row.sum().item() for row in noise}

    def distance(one: torch.Tensor) -> float:
        return float((one - latents).flatten(1).norm(dim=1).sum())

    best = min(distance(noise[list(order)]) for order in itertools.permutations(range(6)))
    assert distance(found) == pytest.approx(best)
    assert distance(found) < distance(noise)


def test_immiscible_noise_leaves_a_batch_of_one_alone() -> None:
    noise = torch.randn(1, 4, 2, 2, generator=generator())
    assert torch.equal(applied("immiscible", noise, immiscible_noise=True), noise)


@pytest.mark.parametrize(
    ("name", "strength", "options"),
    [
        ("noise-offset", "noise_offset", {"adaptive_noise_scale": 0.01}),
        ("noise-offset", "noise_offset", {"noise_offset_random_strength": True}),
        ("multires", "multires_noise_iterations", {"multires_noise_discount": 0.5}),
        ("input-perturbation", "ip_noise_gamma", {"ip_noise_gamma_random_strength": True}),
    ],
)
def test_options_without_their_strength_are_refused(
    name: str, strength: str, options: dict[str, Any]
) -> None:
    (problem,) = problems(name, **options)
    assert [f"--{option}" for option in options] == [problem.place]
    assert f"--{strength}" in problem.message
    # A strength of 0 says that it is off, and what goes with it may stay in a preset.
    off = NOISES[name](**{strength: 0}, **options)
    assert not off.active()
    assert NOISES[name](**{strength: 1}, **options).active()
    assert problems(name, **{strength: 1}, **options) == []
