"""``sdxl-train merge``: networks into a base model, or into one LoRA."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING, ClassVar

from sdxl_lora_plugins.commands.written import (
    WritingCommand,
    most_rank,
    no_plain_lora,
    number,
    open_base,
    progress,
    require,
    require_values,
    stored_dtype,
)
from sdxl_lora_plugins.model import SDXL
from sdxl_train import Field, Problem
from sdxl_train.ldm import open_networks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Never

    from tqdm import tqdm

    from sdxl_train.ldm import NetworkFile


class Merge(WritingCommand):
    """Merge networks into a base model (--sd_model), or into one LoRA.

    Into a single file or a diffusers folder: W + the sum of ratio times delta, each delta of the
    untouched W, computed in fp32, read and written tensor by tensor. Into a LoRA: the exact sum,
    whose ranks add up, or with --new_rank its best approximation of that rank.
    """

    positional: ClassVar[tuple[str, ...]] = ("models",)

    models: list[Path] = Field(min_length=1, description="The networks, of any kind and naming.")
    ratios: list[float] | None = Field(
        None, description="What each delta is multiplied by; 1 for all if not given."
    )
    sd_model: Path | None = Field(
        None, description="Merge into this checkpoint or diffusers folder, instead of into a LoRA."
    )
    new_rank: int | None = Field(None, ge=1, description="Rank of the one LoRA; their sum if not.")

    def run(self) -> int:
        """Merge and write."""
        inputs = [*self.models, *([self.sd_model] if self.sd_model else [])]
        if self.sd_model is not None and self.sd_model.is_dir():
            problems = list(self.place_problems(self.save_to, inputs))
            if self.save_to.is_dir() and not (self.save_to / "model_index.json").is_file():
                problems.append(
                    Problem(
                        place="--save_to",
                        message=f"{self.save_to} is a folder of something else than a model",
                        remedy="name a new folder",
                    )
                )
        else:
            problems = list(self.output_problems(inputs))
        files = open_networks(self.models, SDXL, problems)
        if self.ratios is not None and len(self.ratios) != len(self.models):
            problems.append(
                Problem(
                    place="--ratios",
                    message=f"has {number(len(self.ratios), 'number')} for "
                    f"{number(len(self.models), 'network')}",
                    remedy="give one for each network, in their order",
                )
            )
        if self.sd_model is None:
            problems += self._lora_problems(files)
        elif self.new_rank is not None:
            problems.append(
                Problem(
                    place="--new_rank",
                    message="is of no use with --sd_model: a base model has no rank",
                    remedy="leave it out",
                )
            )
        require(problems)
        require_values(files)
        pairs = list(zip(files, self.ratios or [1.0] * len(files), strict=True))
        if self.sd_model is None:
            self._into_lora(pairs)
        else:
            self._into_model(self.sd_model, pairs)
        return 0

    def _lora_problems(self, files: Sequence[NetworkFile]) -> Iterator[Problem]:
        yield from no_plain_lora(
            files,
            has_base=False,
            remedy="make a LoRA of it first (sdxl-train convert --new_rank N --sd_model FILE), or "
            "merge into the base model with --sd_model",
        )
        for file in files:
            others = {m.title for m in file.modules.values() if m.algorithm != "lora"}
            if others and self.new_rank is None:
                yield Problem(
                    place=str(file.path),
                    message=f"has layers of {' and '.join(sorted(others))}, whose sum is no "
                    "concatenation",
                    remedy="give --new_rank",
                )

    def _into_lora(self, pairs: Sequence[tuple[NetworkFile, float]]) -> None:
        names = dict.fromkeys(name for file, _ in pairs for name in file.modules)
        if self.dry_run:
            for name in names:
                own = [most_rank(f.modules[name]) or 0 for f, _ in pairs if name in f.modules]
                rank = min(sum(own), self.new_rank or sum(own))
                print(f"{name}: ranks {', '.join(map(str, own))} -> LoRA of rank {rank}")
            return
        from sdxl_lora_plugins.commands.merge_run import merged_modules

        merged = merged_modules(pairs, names, self.new_rank)
        modules = ((module, f"rank {module.rank}") for module in merged)
        first = pairs[0][0]
        dtype = self.dtype_or(stored_dtype(first))
        self.write_lora(modules, first.metadata, total=len(names), dtype=dtype)

    def _into_model(self, model: Path, pairs: Sequence[tuple[NetworkFile, float]]) -> None:
        from sdxl_lora_plugins.commands.merge_run import ModelMerge

        with open_base(model, "--sd_model") as base:
            merge = ModelMerge(base, pairs)
            require(list(merge.problems()))
            if self.dry_run or self.verbose:
                for name, parts in merge.places.items():
                    print(f"{name}: + {', '.join(part.module.title for part in parts)}")
            print(f"{len(merge.places)} of {number(len(base.places), 'tensor')} change")
            if self.dry_run:
                return
            bar: tqdm[Never]
            with progress(total=len(base.places), title=self.save_to.name, unit="tensor") as bar:
                merge.write(self.save_to, self.dtype_or, bar.update)
            print(f"wrote {self.save_to}")
