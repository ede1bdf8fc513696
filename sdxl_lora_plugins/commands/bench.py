"""``sdxl-train bench``: how fast training is on this machine, and where its time goes."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from sdxl_train import Field, Problem, TrainingCommand, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

REPLACED: Final = frozenset(
    {
        "pretrained_model_name_or_path",
        "model_type",
        "vae",
        "train_data_dir",
        "reg_data_dir",
        "in_json",
        "dataset_config",
        "output_dir",
        "output_name",
        "max_train_steps",
        "max_train_epochs",
        "resume",
        "initial_step",
        "initial_epoch",
        "validation_split",
        "sample_every_n_steps",
        "sample_every_n_epochs",
        "sample_at_first",
        "sample_prompts",
        "huggingface_repo_id",
    }
)
"""Options of training that a benchmark has its own values for, or does without."""

with warnings.catch_warnings():
    # pydantic 2 still has a long deprecated method of the name that the flag needs.
    warnings.filterwarnings("ignore", 'Field name "json"', UserWarning)

    class Bench(TrainingCommand):
        """Train a made-up SDXL for some steps and measure it: s/it, MFU, memory, where time goes.

        The model has the size of the real one and random weights, made on the device; nothing is
        read or downloaded. It is trained on made-up latents by the same loop as any run, with the
        settings that are given: --resolution, --train_batch_size, --network_dim,
        --gradient_checkpointing, ... Without them: bf16, rank 16, the U-Net alone, encodings cached
        in memory, one image of 1024 x 1024 (without a GPU 256 x 256).

        MFU is the share of what a large matrix product reaches on this device; activations that
        are computed twice do not count.
        """

        tiny: bool = Field(False, description="A tiny SDXL, at 64 x 64: tries out the command.")
        steps: int = Field(10, ge=1, description="Steps to measure.")
        warmup: int = Field(2, ge=1, description="Steps before them, not measured.")
        compare: bool = Field(
            False,
            description="Measure a plain loop of diffusers and peft too, in turns with this "
            "program, and print the ratio.",
        )
        rounds: int = Field(2, ge=1, description="Turns of each with --compare.")
        json: bool = Field(  # type: ignore[assignment]
            False, description="Print one JSON object."
        )

        def run(self) -> int:
            """Measure and print.

            Raises:
                UserError: If an option is wrong, or --compare lacks its library.
            """
            problems = list(self._problems())
            if problems:
                raise UserError(problems)
            from sdxl_lora_plugins.commands.bench_run import run_bench

            run_bench(self)
            return 0

        def _problems(self) -> Iterator[Problem]:
            if self.compare and find_spec("peft") is None:
                yield Problem(
                    place="--compare",
                    message="needs the package peft, which is not installed",
                    remedy="pip install peft, or leave --compare out",
                )
            if "rounds" in self.model_fields_set and not self.compare:
                yield Problem(
                    place="--rounds",
                    message="has no effect without --compare",
                    remedy="add --compare, or leave it out",
                )
