"""``sdxl-train convert``: the same deltas in another naming, or as a plain LoRA."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING, ClassVar, Literal

from sdxl_lora_plugins.commands.written import (
    WritingCommand,
    base_or_none,
    labelled,
    most_rank,
    no_plain_lora,
    number,
    require,
    require_values,
    stored_dtype,
)
from sdxl_lora_plugins.model import SDXL
from sdxl_train import Field, Problem
from sdxl_train.ldm import open_networks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_lora_plugins.files.plain import PlainModule
    from sdxl_train.ldm import NetworkFile, StoredModule


class Convert(WritingCommand):
    """Write a network in another naming; what is no plain LoRA becomes one by SVD.

    Factors of a plain LoRA stay as they are: only their names change, and for diffusers alpha /
    rank is multiplied in. LoHa, LoKr, DoRA and others are approximated with --new_rank; how much of
    each delta is kept is said.
    """

    positional: ClassVar[tuple[str, ...]] = ("model",)

    model: Path = Field(description="The network.")
    to: Literal["kohya", "diffusers", "omi"] = Field(
        "kohya", description="Naming of the result: kohya is read by everything."
    )
    new_rank: int | None = Field(
        None, ge=1, description="Rank of layers that are no plain LoRA; needed where there are any."
    )
    sd_model: Path | None = Field(
        None, description="The base model, where the deltas depend on it (DoRA, OFT, IA3)."
    )

    def run(self) -> int:
        """Rename, or decompose, and write."""
        problems = list(self.output_problems([self.model]))
        files = open_networks([self.model], SDXL, problems)
        problems += no_plain_lora(files, has_base=self.sd_model is not None)
        others = [m.title for file in files for m in file.modules.values() if not _is_plain(m)]
        if others and self.new_rank is None:
            problems.append(
                Problem(
                    place="--new_rank",
                    message=f"is needed for {number(len(others), 'layer')} of "
                    f"{' and '.join(sorted(set(others)))}",
                    remedy="give the rank of the LoRA that is to stand for them",
                )
            )
        elif files and not others and self.new_rank is not None:
            problems.append(
                Problem(
                    place="--new_rank",
                    message="would do nothing: every layer is a plain LoRA, which keeps its rank",
                    remedy="leave it out, or use sdxl-train resize",
                )
            )
        require(problems)
        require_values(files)
        (file,) = files
        layers = number(len(file.modules), "layer")
        print(f"{layers}, {len(others)} by SVD, in the naming of {self.to}")
        if self.dry_run:
            print(*self._listing(file), sep="\n")
            return 0
        self.write_lora(
            self._converted(file),
            file.metadata,
            total=len(file.modules),
            dtype=self.dtype_or(stored_dtype(file)),
            naming=self.to,
        )
        return 0

    def _listing(self, file: NetworkFile) -> Iterator[str]:
        for module in file.modules.values():
            if _is_plain(module):
                yield f"{module.name}: {labelled(module)}, as it is"
            else:
                sides = [rank for rank in (self.new_rank, most_rank(module)) if rank]
                yield f"{module.name}: {labelled(module)} -> LoRA of rank {min(sides)}"

    def _converted(self, file: NetworkFile) -> Iterator[tuple[PlainModule, str]]:
        from sdxl_lora_plugins.files.plain import decompose, from_svd, stored, weight_shape
        from sdxl_train.ldm import delta

        lost: list[float] = []
        with file.weights() as read, base_or_none(self.sd_model) as base:
            for module in file.modules.values():
                tensors = read(module)
                weight = base.weight(module.layer) if base and module.needs_base else None
                plain = stored(module, tensors, weight)
                if plain is not None:
                    yield plain, f"{module.title} of rank {plain.rank}"
                    continue
                svd = decompose(module, tensors, weight, self.new_rank)
                whole = delta(module, tensors, weight)
                norm = 0.0 if whole is None else float(whole.norm())
                kept = float(svd.s.norm()) / norm if norm else 1.0
                lost.append(kept)
                yield (
                    from_svd(module.layer, weight_shape(module, weight), svd),
                    f"{module.title}, {kept:.1%} of the norm kept",
                )
        if lost:
            print(f"decomposed deltas keep {min(lost):.1%} to {max(lost):.1%} of their norms")


def _is_plain(module: StoredModule) -> bool:
    return module.algorithm == "lora" and not module.is_dora
