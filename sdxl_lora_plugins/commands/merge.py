"""``sdxl-train merge``: networks into a checkpoint, or into one LoRA."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING, ClassVar

from sdxl_lora_plugins.commands.written import (
    WritingCommand,
    no_plain_lora,
    open_base,
    require,
    stored_dtype,
)
from sdxl_lora_plugins.files.opening import open_networks
from sdxl_train import Field, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sdxl_lora_plugins.files import NetworkFile


class Merge(WritingCommand):
    """Merge networks into a checkpoint (--sd_model), or into one LoRA.

    Into a checkpoint: W + the sum of ratio times delta, each delta of the untouched W, computed in
    fp32, read and written tensor by tensor. Into a LoRA: the exact sum, whose ranks add up, or with
    --new_rank its best approximation of that rank.
    """

    positional: ClassVar[tuple[str, ...]] = ("models",)

    models: list[Path] = Field(description="The networks, of any kind and naming.")
    ratios: list[float] | None = Field(
        None, description="What each delta is multiplied by; 1 for all if not given."
    )
    sd_model: Path | None = Field(
        None, description="Merge into this single-file checkpoint instead of into one LoRA."
    )
    new_rank: int | None = Field(None, ge=1, description="Rank of the one LoRA; their sum if not.")

    def run(self) -> int:
        """Merge and write."""
        inputs = [*self.models, *([self.sd_model] if self.sd_model else [])]
        problems = list(self.output_problems(inputs))
        files = open_networks(self.models, problems)
        if self.ratios is not None and len(self.ratios) != len(self.models):
            problems.append(
                Problem(
                    place="--ratios",
                    message=f"has {len(self.ratios)} numbers for {len(self.models)} networks",
                )
            )
        if self.sd_model is None:
            problems += self._lora_problems(files)
        elif self.new_rank is not None:
            problems.append(Problem(place="--new_rank", message="is of no use with --sd_model"))
        elif self.sd_model.is_dir():
            problems.append(
                Problem(
                    place="--sd_model", message=f"{self.sd_model} is a folder, not a single file"
                )
            )
        require(problems)
        pairs = list(zip(files, self.ratios or [1.0] * len(files), strict=True))
        if self.sd_model is None:
            return self._into_lora(pairs)
        return self._into_checkpoint(self.sd_model, pairs)

    def _lora_problems(self, files: Sequence[NetworkFile]) -> Iterator[Problem]:
        yield from no_plain_lora(files, has_base=False)
        for file in files:
            others = {m.title for m in file.modules.values() if m.algorithm != "lora"}
            if others and self.new_rank is None:
                yield Problem(
                    place=str(file.path),
                    message=f"has layers of {' and '.join(sorted(others))}, whose sum is no "
                    "concatenation",
                    remedy="give --new_rank",
                )

    def _into_lora(self, pairs: Sequence[tuple[NetworkFile, float]]) -> int:
        from sdxl_lora_plugins.commands.merge_run import merged_modules
        from sdxl_lora_plugins.files.plain import write_plain

        modules = list(merged_modules(pairs, self.new_rank))
        ranks = sorted({module.rank for module in modules})
        print(f"{len(modules)} layers of rank {ranks[0]} to {ranks[-1]}")
        if not self.dry_run:
            first = pairs[0][0]
            dtype = self.dtype_or(stored_dtype(first))
            write_plain(self.save_to, modules, first.metadata, dtype=dtype)
            print(f"wrote {self.save_to}")
        return 0

    def _into_checkpoint(self, checkpoint: Path, pairs: Sequence[tuple[NetworkFile, float]]) -> int:
        from sdxl_lora_plugins.commands.merge_run import CheckpointMerge

        with open_base(checkpoint, "--sd_model") as base:
            merge = CheckpointMerge(base, pairs)
            require(list(merge.problems()))
            print(f"{len(merge.places)} of {len(base.places)} tensors change")
            if not self.dry_run:
                merge.write(self.save_to, self.dtype_or)
                print(f"wrote {self.save_to}")
        return 0
