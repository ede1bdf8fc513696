"""``plan --memory`` of a run that does not fit: which options to change."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from sdxl_train.cli import main
from sdxl_train.fitting import remarks
from sdxl_train.preflight import Prepared, prepare
from sdxl_train.settings import from_words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

GIGABYTE = 10**9


@pytest.fixture
def words(tiny_file: Path, photographs: Path, tmp_path: Path) -> list[str]:
    """A run on images that are large enough to count beside the process."""
    return [
        *("--pretrained_model_name_or_path", str(tiny_file), "--train_data_dir", str(photographs)),
        *("--output_dir", str(tmp_path), "--resolution", "512", "--network_dim", "4"),
        *("--network_train_unet_only", "--cache_latents"),
    ]


def test_options_with_which_it_fits_are_told_and_give_the_peak_that_is_told(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(*flags: str, available: int) -> dict[str, Any]:
        monkeypatch.setattr("sdxl_train.fitting.available_bytes", lambda device: available)
        assert (
            main(["plan", *words, "--cache_text_encoder_outputs", *flags, "--memory", "--json"])
            == 0
        )
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    wide = plan(available=GIGABYTE * 1000)
    assert not [text for text in wide["warnings"] if "are available" in text]
    peak = wide["memory"]["peak_bytes"]
    found = plan(available=peak - 10**6)
    (told,) = [text for text in found["warnings"] if "are available" in text]
    advice = re.search(r"with --mixed_precision bf16 it takes (\S+) GB$", told)
    assert advice
    narrow = plan("--mixed_precision", "bf16", available=GIGABYTE * 1000)["memory"]
    grown = narrow["process_bytes"] - found["memory"]["process_bytes"]
    assert f"{(narrow['peak_bytes'] - grown) / 1e9:.1f}" == advice[1]
    assert narrow["peak_bytes"] - grown < found["memory"]["peak_bytes"] - 10**7


def peak_of(prepared: Prepared) -> Mapping[str, int]:
    """A run of 8 GB, of which each option spares something."""
    config = prepared.config
    spared = 2 * config.model.gradient_checkpointing
    spared += 1 * (config.training.mixed_precision == "bf16")
    spared += 2 * (config.quantization.build() is not None)
    spared += config.dataset.caches_text
    taken = (8 - spared) * GIGABYTE
    return {"passes_peak_bytes": taken, "peak_bytes": taken, "process_bytes": 7}


@pytest.fixture
def advice(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, int], tuple[list[str], int]]:
    """Give what is said with so many gigabytes, and how many runs were foretold for it."""

    def give(flags: str, available: int) -> tuple[list[str], int]:
        monkeypatch.setattr(
            "sdxl_train.fitting.available_bytes", lambda device: available * GIGABYTE
        )
        prepared = prepare(from_words([*words, *flags.split()], [])[0], start=False)
        processes: list[int] = []

        def forecast(other: Prepared, process: int) -> Mapping[str, int]:
            processes.append(process)
            return peak_of(other)

        told = list(remarks(prepared, peak_of(prepared), forecast))
        assert set(processes) <= {7}
        return told, len(processes)

    return give


def test_the_mildest_options_that_are_enough_are_told(
    advice: Callable[[str, int], tuple[list[str], int]],
) -> None:
    needed = "about 8.0 GB are needed at most, in the forward and backward pass, and"
    assert advice("", 8) == ([], 0)
    assert advice("", 7) == (
        [f"{needed} 7.0 GB are available: with --cache_text_encoder_outputs it takes 7.0 GB"],
        1,
    )
    three = "--cache_text_encoder_outputs --mixed_precision bf16 --gradient_checkpointing"
    assert advice("", 4) == ([f"{needed} 4.0 GB are available: with {three} it takes 4.0 GB"], 3)
    assert advice("", 1)[0] == [
        f"{needed} 1.0 GB are available: with {three} --base_quantization fp8 it takes 2.0 GB, "
        "still too much: try a smaller --resolution or --network_dim too"
    ]


def test_what_another_option_forbids_or_has_already_is_not_told(
    advice: Callable[[str, int], tuple[list[str], int]],
) -> None:
    (told,), _ = advice("--shuffle_caption --gradient_checkpointing", 5)
    assert told.endswith("with --mixed_precision bf16 it takes 5.0 GB")
    everything = "--cache_text_encoder_outputs --mixed_precision bf16 --gradient_checkpointing"
    (told,), foretold = advice(f"{everything} --fp8_base", 1)
    assert told.endswith("1.0 GB are available: try a smaller --resolution or --network_dim")
    assert foretold == 0


def test_smaller_batches_keep_the_number_of_samples_of_a_step(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdxl_train.fitting.available_bytes", lambda device: 1)
    flags = "--train_batch_size 4 --gradient_accumulation_steps 2"
    prepared = prepare(from_words([*words, *flags.split()], [])[0], start=False)

    def forecast(other: Prepared, process: int) -> Mapping[str, int]:
        taken = 10**9 * other.config.dataset.train_batch_size
        return {"passes_peak_bytes": taken, "peak_bytes": taken, "process_bytes": process}

    (told,) = remarks(prepared, forecast(prepared, 0), forecast)
    assert "with --train_batch_size 1 --gradient_accumulation_steps 8 it takes 1.0 GB" in told
