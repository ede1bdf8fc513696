"""``sdxl-train extract``: the difference of two checkpoints as a LoRA."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING

from sdxl_lora_plugins.commands.written import WritingCommand, open_base, require
from sdxl_train import Field, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_lora_plugins.files.base import BaseWeights
    from sdxl_lora_plugins.files.plain import PlainModule


class Extract(WritingCommand):
    """Make a LoRA of what distinguishes one checkpoint from another, layer by layer.

    Linear layers and 1x1 convolutions get --dim, 3x3 convolutions --conv_dim; layers that are the
    same in both get none. Either model is a single file or a diffusers folder.
    """

    model_org: Path = Field(description="The original checkpoint.")
    model_tuned: Path = Field(description="The checkpoint that was trained from it.")
    dim: int = Field(ge=1, description="Rank of linear layers and 1x1 convolutions.")
    conv_dim: int | None = Field(
        None, ge=1, description="Rank of 3x3 convolutions; they are left out if not given."
    )

    def run(self) -> int:
        """Decompose the differences and write."""
        require(list(self.output_problems([self.model_org, self.model_tuned])))
        with (
            open_base(self.model_org, "--model_org") as original,
            open_base(self.model_tuned, "--model_tuned") as tuned,
        ):
            modules = list(self._extracted(original, tuned))
        if not modules:
            raise UserError.of("--model_tuned", "every layer is as in --model_org")
        if not self.dry_run:
            import torch

            from sdxl_lora_plugins.files.plain import write_plain

            metadata = {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
            dtype = self.dtype_or(torch.float16)
            write_plain(self.save_to, modules, metadata, dtype=dtype)
            print(f"wrote {self.save_to}")
        return 0

    def _extracted(self, original: BaseWeights, tuned: BaseWeights) -> Iterator[PlainModule]:
        from math import prod

        from sdxl_lora_plugins.files.lowrank import of_matrix
        from sdxl_lora_plugins.files.plain import from_svd

        for layer in original.layers():
            before, after = original.weight(layer), tuned.weight(layer)
            if before is None or after is None or before.shape != after.shape:
                raise UserError.of("--model_tuned", f"its {layer.kohya} does not fit --model_org")
            shape = tuple(before.shape)
            rank = self.conv_dim if prod(shape[2:]) > 1 else self.dim
            difference = (after.float() - before.float()).flatten(1)
            norm = float(difference.norm())
            if rank is None or norm == 0:
                continue
            svd = of_matrix(difference, rank)
            kept = float(svd.s.norm()) / norm
            print(f"{layer.kohya}: rank {len(svd.s)}, {kept:.1%} of the norm")
            yield from_svd(layer, shape, svd)
