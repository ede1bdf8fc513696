"""Options that contradict one another or their range: refused at once, with the names of both.

Through the command line in this process. What the run only remarks on goes on and says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import Planned

CONTRADICTIONS: list[tuple[str, tuple[str, ...]]] = [
    # noise, timesteps, losses, weightings
    ("--adaptive_noise_scale 0.1", ("--adaptive_noise_scale", "--noise_offset")),
    ("--noise_offset_random_strength", ("--noise_offset_random_strength", "--noise_offset")),
    ("--multires_noise_discount 0.5", ("--multires_noise_discount", "--multires_noise_iterations")),
    ("--ip_noise_gamma_random_strength", ("--ip_noise_gamma_random_strength", "--ip_noise_gamma")),
    ("--scale_v_pred_loss_like_noise_pred", ("--scale_v_pred", "--v_parameterization true")),
    (
        "--v_pred_like_loss 1 --v_parameterization",
        ("--v_pred_like_loss", "(--v_parameterization)"),
    ),
    ("--weighting min-snr", ("--weighting", "--min_snr_gamma")),
    ("--weighting v-pred-like", ("--weighting", "--v_pred_like_loss")),
    ("--p2_k 2", ("--p2_k", "--p2_gamma")),
    ("--huber_c 0.2", ("--huber_c", "--loss_type huber")),
    ("--loss_type l1 --huber_schedule snr", ("--huber_schedule", "--loss_type huber")),
    ("--min_timestep 500 --max_timestep 300", ("--min_timestep", "--max_timestep 300")),
    ("--logit_mean 1", ("--logit_mean", "--timestep_sampling logit-normal")),
    ("--timestep_sampling table", ("--timestep_weights", "--timestep_weights_file")),
    # optimizers and schedules
    ("--lr_warmup_steps 2", ("--lr_warmup_steps", "--lr_scheduler constant_with_warmup")),
    ("--lr_warmup_steps 20 --lr_scheduler cosine", ("--lr_warmup_steps", "of 4 steps")),
    (
        "--lr_scheduler cosine --lr_scheduler_num_cycles 3",
        ("--lr_scheduler_num_cycles", "cosine_with_restarts"),
    ),
    ("--lr_scheduler_power 2", ("--lr_scheduler_power", "--lr_scheduler polynomial")),
    ("--lr_decay_steps 1", ("--lr_decay_steps", "--lr_scheduler warmup_stable_decay")),
    (
        "--optimizer_type Prodigy --learning_rate 1 --unet_lr 0.5 --text_encoder_lr 1",
        ("--optimizer_type", "--unet_lr", "--text_encoder_lr"),
    ),
    (
        "--optimizer_type Prodigy --learning_rate 1 --network_args loraplus_lr_ratio=16",
        ("--optimizer_type", "loraplus_lr_ratio"),
    ),
    ("--optimizer_args weight_decay=abc", ("--optimizer_args weight_decay", "'abc'")),
    ("--optimizer_args decouple=True", ("--optimizer_args decouple", "AdamW")),
    # what trains, and from which caches
    (
        "--network_train_unet_only --network_train_text_encoder_only",
        ("--network_train_unet_only", "network_train_text_encoder_only"),
    ),
    (
        "--cache_text_encoder_outputs",
        ("--cache_text_encoder_outputs", "--network_train_unet_only"),
    ),
    (
        "--cache_text_encoder_outputs --network_train_unet_only --shuffle_caption",
        ("--cache_text_encoder_outputs", "--shuffle_caption"),
    ),
    (
        "--cache_text_encoder_outputs --network_train_unet_only --caption_tag_dropout_rate 0.1",
        ("--cache_text_encoder_outputs", "--caption_tag_dropout_rate"),
    ),
    ("--cache_latents --random_crop", ("--cache_latents", "--random_crop")),
    ("--cache_latents --color_aug", ("--cache_latents", "--color_aug")),
    ("--bucket_reso_steps 16", ("--bucket_reso_steps", "multiple of 32")),
    ("--no_half_vae --vae_dtype bf16", ("--no_half_vae", "--vae_dtype")),
    ("--learning_rate 0", ("--learning_rate", "nothing is left to train")),
    ("--initial_step 9", ("--initial_step", "of 4 steps")),
]

RANGES = [
    *(f"--learning_rate {value}" for value in ("nan", "inf", "-1e-4")),
    *("--unet_lr -1", "--text_encoder_lr nan", "--network_dim 0", "--network_dim -4"),
    *("--network_alpha -1", "--network_alpha nan", "--network_dropout 1.5", "--network_dropout 1"),
    *("--train_batch_size 0", "--dataset_repeats -1", "--max_train_steps 0"),
    *("--max_train_epochs 0", "--gradient_accumulation_steps 0", "--max_grad_norm -1"),
    *("--noise_offset nan", "--noise_offset -0.1", "--multires_noise_iterations -1"),
    *("--multires_noise_discount 1.5", "--ip_noise_gamma -1", "--min_snr_gamma -5"),
    *("--v_pred_like_loss -1", "--huber_c 0", "--huber_scale 0", "--min_timestep -1"),
    *("--max_timestep 0", "--max_timestep 2000", "--lr_warmup_steps -1", "--lr_warmup_steps 1.5"),
    *("--lr_warmup_steps 150%", "--prior_loss_weight -1", "--caption_dropout_rate 1.5"),
    *("--seed -1", "--resolution 0", "--save_every_n_epochs 0", "--p2_gamma -1"),
]

REMARKS: list[tuple[str, tuple[str, ...]]] = [
    ("--zero_terminal_snr", ("--zero_terminal_snr", "--v_parameterization")),
    ("--max_train_epochs 1", ("--max_train_steps", "--max_train_epochs")),
    ("--max_train_steps None", ("--max_train_steps", "--max_train_epochs", "1600")),
    (
        "--text_encoder_lr 1e-5 --network_train_unet_only",
        ("--text_encoder_lr", "--network_train_unet_only"),
    ),
    ("--save_last_n_epochs 2", ("--save_last_n_epochs", "save_every_n_epochs")),
    ("--save_last_n_steps 2", ("--save_last_n_steps", "save_every_n_steps")),
    ("--save_last_n_steps_state 2", ("--save_last_n_steps_state", "save_state")),
    (
        "--persistent_data_loader_workers",
        ("--persistent_data_loader_workers", "max_data_loader_n_workers"),
    ),
    ("--prior_loss_weight 0.5", ("--prior_loss_weight", "regularization images")),
    ("--optimizer_type Prodigy --learning_rate 1e-4", ("Prodigy", "--learning_rate 1")),
]


@pytest.mark.parametrize(("flags", "named"), CONTRADICTIONS)
def test_a_contradiction_is_refused_with_both_names(
    flags: str, named: tuple[str, ...], planned: Planned
) -> None:
    code, text = planned(flags)
    assert code == 2
    assert all(name in text for name in named), text


@pytest.mark.parametrize("flags", RANGES)
def test_a_value_out_of_range_is_refused_with_its_name(flags: str, planned: Planned) -> None:
    if flags.startswith("--huber"):
        flags += " --loss_type huber"
    code, text = planned(flags)
    assert code == 2
    assert flags.split()[0] in text


@pytest.mark.parametrize(("flags", "named"), REMARKS)
def test_what_has_no_effect_is_remarked_on(
    flags: str, named: tuple[str, ...], planned: Planned
) -> None:
    code, text = planned(flags)
    assert code == 0, text
    assert any(all(name in line for name in named) for line in text.splitlines()), text


def test_all_mistakes_of_a_file_are_told_at_once_with_their_lines(
    tmp_path: Path, planned: Planned
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        "[noise]\nadaptive_noise_scale = 0.1\n[loss]\nv_pred_like_loss = 1.0\n"
        "[model]\nv_parameterization = true\nnetwork_train_unet_only = true\n"
        "network_train_text_encoder_only = true\n",
        encoding="utf-8",
    )
    code, text = planned(f"--config_file {file}")
    assert code == 2
    for line, name in (
        (2, "noise.adaptive_noise_scale"),
        (4, "loss.v_pred_like_loss"),
        (6, "model.v_parameterization"),
        (7, "model.network_train_unet_only"),
    ):
        assert f"{file}:{line} {name}" in text
