"""Timesteps, noise, loss, weighting and the noise schedule, against formulas and diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import DDPMScheduler

from sdxl_lora_plugins.losses import L2
from sdxl_lora_plugins.noises import NoiseOffset
from sdxl_lora_plugins.timesteps import Uniform
from sdxl_lora_plugins.weightings import MinSnr
from sdxl_train import NoiseSchedule, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdxl_train import PredictionType

GOLDEN_TIMESTEPS = torch.tensor([0, 1, 100, 500, 900, 999])
"""The timesteps of the golden numbers."""


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear()


@pytest.fixture
def velocity_schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear(prediction_type="v_prediction")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference(prediction_type: PredictionType) -> Any:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
    )


# ------------------------------------------------------------------------------- noise schedule


def test_schedule_equals_the_golden_one(
    schedule: NoiseSchedule, golden: Callable[[str], Any]
) -> None:
    numbers = golden("timestep_weights")
    abar = schedule.alphas_cumprod[GOLDEN_TIMESTEPS]
    assert abar.tolist() == pytest.approx(numbers["alphas_cumprod"], rel=1e-6)
    assert schedule.snr(GOLDEN_TIMESTEPS).tolist() == pytest.approx(numbers["all_snr"], rel=1e-5)


def test_schedule_has_the_known_values(schedule: NoiseSchedule) -> None:
    timesteps = torch.tensor([0, 1, 10, 100, 250, 500, 750, 900, 999])
    abar = [0.99914998, 0.99829602, 0.99043131, 0.89422315, 0.6737923]
    abar += [0.27633247, 0.0561698, 0.01415113, 0.0046601]
    snr = [
        1175.4406,
        585.862183,
        103.5075,
        8.453866,
        2.065532,
        0.38185,
        0.059513,
        0.014354,
        0.004682,
    ]
    assert schedule.num_timesteps == 1000
    assert schedule.alphas_cumprod[timesteps].tolist() == pytest.approx(abar, rel=1e-5)
    assert schedule.snr(timesteps).tolist() == pytest.approx(snr, rel=1e-4)


def test_schedule_falls_strictly_within_bounds(schedule: NoiseSchedule) -> None:
    abar = schedule.alphas_cumprod
    assert abar.dtype == torch.float32
    assert bool((abar.diff() < 0).all())
    assert 0 <= float(abar.min()) < float(abar.max()) < 1


def test_noising_equals_that_of_diffusers(schedule: NoiseSchedule) -> None:
    latents, noise = torch.randn(2, 3, 4, 6, 5, generator=generator())
    timesteps = torch.tensor([0, 417, 999])
    ours = schedule.add_noise(latents, noise, timesteps)
    theirs = reference("epsilon").add_noise(latents, noise, timesteps)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_velocity_equals_that_of_diffusers(velocity_schedule: NoiseSchedule) -> None:
    latents, noise = torch.randn(2, 3, 4, 6, 5, generator=generator())
    timesteps = torch.tensor([0, 417, 999])
    theirs = reference("v_prediction").get_velocity(latents, noise, timesteps)
    ours = velocity_schedule.target(latents, noise, timesteps)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, velocity_schedule.velocity(latents, noise, timesteps))


def test_target_of_epsilon_is_the_noise(schedule: NoiseSchedule) -> None:
    latents, noise = torch.randn(2, 3, 4, 6, 5, generator=generator())
    assert schedule.target(latents, noise, torch.tensor([0, 417, 999])) is noise


def test_zero_terminal_snr_equals_that_of_diffusers(schedule: NoiseSchedule) -> None:
    ours = schedule.with_zero_terminal_snr()
    theirs = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
    ).alphas_cumprod
    torch.testing.assert_close(ours.alphas_cumprod, theirs, rtol=1e-4, atol=1e-7)
    assert ours.zero_terminal_snr
    assert not schedule.zero_terminal_snr
    assert ours.alphas_cumprod[0] == pytest.approx(float(schedule.alphas_cumprod[0]))


def test_last_timestep_of_zero_terminal_snr_is_pure_noise(
    velocity_schedule: NoiseSchedule,
) -> None:
    schedule = velocity_schedule.with_zero_terminal_snr()
    latents, noise = torch.randn(2, 1, 4, 6, 5, generator=generator())
    last = torch.tensor([999])
    assert torch.equal(schedule.add_noise(latents, noise, last), noise)
    assert torch.equal(schedule.target(latents, noise, last), -latents)


# ----------------------------------------------------------------------------------- weightings


@pytest.mark.parametrize("gamma", [1, 5, 20])
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_min_snr_equals_the_golden_weights(
    gamma: int, kind: str, golden: Callable[[str], Any]
) -> None:
    prediction: PredictionType = "v_prediction" if kind == "v" else "epsilon"
    schedule = NoiseSchedule.scaled_linear(prediction_type=prediction)
    weights = MinSnr(min_snr_gamma=gamma).build(schedule)(GOLDEN_TIMESTEPS)
    expected = golden("timestep_weights")[f"{kind}.min_snr_{gamma}"]
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)


def test_min_snr_weights_are_positive_and_at_most_one(schedule: NoiseSchedule) -> None:
    weights = MinSnr(min_snr_gamma=5).build(schedule)(torch.arange(1000))
    assert weights.shape == (1000,)
    assert bool(((weights > 0) & (weights <= 1)).all())


def test_min_snr_of_0_is_off() -> None:
    assert not MinSnr(min_snr_gamma=0).active()
    assert MinSnr(min_snr_gamma=5).active()


# ---------------------------------------------------------------------------------------- noise


def test_noise_offset_adds_one_number_to_each_channel(schedule: NoiseSchedule) -> None:
    noise = torch.randn(3, 4, 8, 6, generator=generator(1))
    transform = NoiseOffset(noise_offset=0.0357).build(schedule)
    out = transform(noise, torch.zeros_like(noise), torch.zeros(3).long(), generator(2))
    shift = torch.randn(3, 4, 1, 1, generator=generator(2))
    torch.testing.assert_close(out, noise + 0.0357 * shift)
    added = out - noise
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added), rtol=0, atol=1e-6)


def test_noise_offset_has_its_standard_deviation(schedule: NoiseSchedule) -> None:
    transform = NoiseOffset(noise_offset=0.5).build(schedule)
    zeros = torch.zeros(5000, 4, 1, 1)
    shifts = transform(zeros, zeros, torch.zeros(5000).long(), generator())
    # The standard error of a mean of 20 000 is s / 141, that of a deviation s / 200.
    assert float(shifts.mean()) == pytest.approx(0.0, abs=4 * 0.5 / 141)
    assert float(shifts.std()) == pytest.approx(0.5, abs=4 * 0.5 / 200)


def test_noise_offset_is_predicted_and_leaves_its_input_alone(schedule: NoiseSchedule) -> None:
    assert NoiseOffset.phase == "target"
    noise = torch.randn(1, 4, 2, 2, generator=generator())
    before = noise.clone()
    NoiseOffset(noise_offset=1).build(schedule)(noise, noise, torch.tensor([0]), generator())
    assert torch.equal(noise, before)
    assert not NoiseOffset(noise_offset=0).active()


# ------------------------------------------------------------------------------------ timesteps


def test_uniform_timesteps_cover_the_schedule_evenly(schedule: NoiseSchedule) -> None:
    drawn = Uniform().build(schedule)(100_000, generator())
    assert drawn.dtype == torch.int64
    assert (int(drawn.min()), int(drawn.max())) == (0, 999)
    counts = torch.bincount(drawn // 100, minlength=10).float()
    # Pearson's chi-squared with nine degrees of freedom exceeds 27.9 once in a thousand draws.
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 27.9


def test_uniform_range_includes_its_start_but_not_its_end(schedule: NoiseSchedule) -> None:
    drawn = Uniform(min_timestep=200, max_timestep=205).build(schedule)(1000, generator())
    assert set(drawn.tolist()) == {200, 201, 202, 203, 204}


def test_uniform_timesteps_depend_on_the_generator_alone(schedule: NoiseSchedule) -> None:
    sample = Uniform().build(schedule)
    first = sample(8, generator(3))
    torch.manual_seed(99)
    assert torch.equal(sample(8, generator(3)), first)
    assert not torch.equal(sample(8, generator(4)), first)


def test_uniform_range_beyond_the_schedule_is_refused(schedule: NoiseSchedule) -> None:
    for bounds in ({"max_timestep": 1001}, {"min_timestep": 1000}):
        with pytest.raises(UserError, match="within 0 to 1000"):
            Uniform(**bounds).build(schedule)


# ----------------------------------------------------------------------------------------- loss


def test_l2_is_the_squared_error_by_element(schedule: NoiseSchedule) -> None:
    target = torch.zeros(1, 1, 1, 4)
    prediction = torch.tensor([0.0, 0.05, 0.1, 1.0]).view(1, 1, 1, 4)
    loss = L2().build(schedule)(prediction, target, torch.tensor([0]))
    assert loss.shape == target.shape
    assert loss.flatten().tolist() == pytest.approx([0, 0.0025, 0.01, 1])
