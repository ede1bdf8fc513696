"""Sample pictures while training: what is asked for, and when. Light to import."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING, ClassVar

from sdxl_lora_plugins.observers.prompts import read_prompts
from sdxl_train import Field, Observer, Problem, UserError
from sdxl_train.ldm import SamplerName  # noqa: TC001 - pydantic needs it

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sdxl_train import Run, RunConfig, StepCounts


class SampleImages(Observer):
    """Sample pictures of prompts while training."""

    unlimited: ClassVar[bool] = True
    everywhere: ClassVar[bool] = True

    sample_prompts: Path | None = Field(
        None, description="File of prompts to sample: .txt (one a line), .toml or .json."
    )
    sample_every_n_steps: int | None = Field(
        None, ge=0, description="Sample each N optimizer steps; 0 = off."
    )
    sample_every_n_epochs: int | None = Field(
        None, ge=0, description="Sample at the end of each N epochs; 0 = off."
    )
    sample_at_first: bool = Field(False, description="Sample before the first step too.")
    sample_sampler: SamplerName = Field(
        "ddim", description="Sampler of prompts that name none (--ss); k_ and _karras: Karras."
    )

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Yield what is wrong with the prompts."""
        if self.sample_prompts is not None:
            try:
                read_prompts(self.sample_prompts.expanduser())
            except UserError as error:
                yield from error.problems
        elif self._asks():
            given = sorted(self.model_fields_set)
            yield Problem(
                place=", ".join(config.place(name) for name in given),
                message="no prompts are given to sample",
                remedy="add --sample_prompts FILE",
            )

    def remarks(self, config: RunConfig) -> Iterator[str]:
        """Yield what is sampled otherwise than asked for, and what has no effect."""
        if self.sample_prompts is None:
            return
        try:
            prompts = read_prompts(self.sample_prompts.expanduser())
        except UserError:  # problems of their own, which `check` reports
            return
        for prompt in prompts:
            yield from prompt.remarks()
        if not self._is_periodic():
            yield (
                f"{config.place('sample_prompts')}: sampled once, after the last step; "
                f"--sample_every_n_steps, --sample_every_n_epochs and --sample_at_first say more"
            )

    def sample_steps(self, counts: StepCounts) -> Sequence[int]:
        """Give the steps after which pictures are due; 0 is before the first."""
        if self.sample_prompts is None:
            return ()
        if not self._is_periodic():
            return [counts.total]
        first = [0] if self.sample_at_first else []
        return [*first, *(step for step in range(1, counts.total + 1) if self._due(step, counts))]

    def names_epoch(self, step: int, counts: StepCounts) -> bool:
        """Tell whether the pictures after ``step`` are those of an epoch."""
        epoch = counts.epoch_ended_by(step)
        every = self.sample_every_n_epochs
        return bool(step == 0 or (every and epoch and epoch % every == 0))

    def build(self, run: Run) -> object:
        """Build the sampler of this run, with the prompts encoded while that is possible."""
        from sdxl_lora_plugins.observers.sampling import Sampling

        assert self.sample_prompts is not None
        return Sampling(self, run, read_prompts(self.sample_prompts.expanduser()))

    def active(self) -> bool:
        """Tell whether pictures are asked for."""
        return self.sample_prompts is not None or self._asks()

    def _asks(self) -> bool:
        """Tell whether anything but the prompts asks for pictures."""
        return self._is_periodic() or "sample_sampler" in self.model_fields_set

    def _is_periodic(self) -> bool:
        return bool(self.sample_every_n_steps or self.sample_every_n_epochs or self.sample_at_first)

    def _due(self, step: int, counts: StepCounts) -> bool:
        every = self.sample_every_n_steps
        return bool(every and step % every == 0) or self.names_epoch(step, counts)
