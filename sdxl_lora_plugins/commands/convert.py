"""``sdxl-train convert``: the same deltas in another naming, or as a plain LoRA."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING, ClassVar, Literal

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
    from collections.abc import Iterator

    from sdxl_lora_plugins.files import NetworkFile
    from sdxl_lora_plugins.files.plain import PlainModule


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
        files = open_networks([self.model], problems)
        problems += no_plain_lora(files, has_base=self.sd_model is not None)
        others = [
            module.title
            for file in files
            for module in file.modules.values()
            if module.algorithm != "lora" or module.is_dora
        ]
        if others and self.new_rank is None:
            problems.append(
                Problem(
                    place="--new_rank",
                    message=f"is needed: {len(others)} layers are "
                    f"{' and '.join(sorted(set(others)))}",
                    remedy="give the rank of the LoRA that is to stand for them",
                )
            )
        require(problems)
        from sdxl_lora_plugins.files.plain import write_plain

        modules = list(self._converted(files[0]))
        print(f"{len(modules)} layers, {len(others)} by SVD, in the naming of {self.to}")
        if not self.dry_run:
            dtype = self.dtype_or(stored_dtype(files[0]))
            write_plain(self.save_to, modules, files[0].metadata, naming=self.to, dtype=dtype)
            print(f"wrote {self.save_to}")
        return 0

    def _converted(self, file: NetworkFile) -> Iterator[PlainModule]:
        from contextlib import nullcontext

        from sdxl_lora_plugins.files.deltas import delta
        from sdxl_lora_plugins.files.plain import decompose, from_svd, stored, weight_shape

        opened = open_base(self.sd_model, "--sd_model") if self.sd_model else nullcontext()
        with file.weights() as read, opened as base:
            for module in file.modules.values():
                tensors = read(module)
                weight = base.weight(module.layer) if base and module.needs_base else None
                plain = stored(module, tensors, weight)
                if plain is not None:
                    yield plain
                    continue
                svd = decompose(module, tensors, weight, self.new_rank)
                whole = delta(module, tensors, weight)
                norm = 0.0 if whole is None else float(whole.norm())
                kept = float(svd.s.norm()) / norm if norm else 1.0
                print(f"{module.name}: {module.title}, {kept:.1%} of the norm kept")
                yield from_svd(module.layer, weight_shape(module, weight), svd)
