"""``sdxl-train extract``: the difference of two checkpoints as a LoRA."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING

from sdxl_lora_plugins.commands.written import (
    WritingCommand,
    open_base,
    progress,
    require,
)
from sdxl_train import Field, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from sdxl_lora_plugins.files.base import BaseWeights
    from sdxl_lora_plugins.files.plain import PlainModule
    from sdxl_train.ldm import Layer


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
            layers = list(original.layers())
            changed = self._changed(layers, original, tuned)
            if self.dry_run:
                count = 0
                for layer, rank, difference in progress(
                    changed, total=len(layers), title="compare"
                ):
                    print(f"{layer.kohya}: LoRA of rank {rank} for {list(difference.shape)}")
                    count += 1
                print(f"{count} of {len(layers)} layers differ")
                return 0
            import torch

            metadata = {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
            dtype = self.dtype_or(torch.float16)
            modules = self._extracted(changed)
            self.write_lora(modules, metadata, total=len(layers), dtype=dtype)
        return 0

    def _changed(
        self, layers: list[Layer], original: BaseWeights, tuned: BaseWeights
    ) -> Iterator[tuple[Layer, int, torch.Tensor]]:
        """Yield the layers that differ, the rank that they get, and the difference.

        Raises:
            UserError: If the models do not fit together, or are the same.
        """
        from math import prod

        is_same = True
        for layer in layers:
            before, after = original.weight(layer), tuned.weight(layer)
            if before is None or after is None or before.shape != after.shape:
                raise UserError.of("--model_tuned", f"its {layer.kohya} does not fit --model_org")
            rank = self.conv_dim if prod(before.shape[2:]) > 1 else self.dim
            if rank is None:
                continue
            difference = after.float() - before.float()
            if difference.any():
                is_same = False
                yield layer, min(rank, len(before), prod(before.shape[1:])), difference
        if is_same:
            raise UserError.of("--model_tuned", "every layer is as in --model_org")

    def _extracted(
        self, changed: Iterator[tuple[Layer, int, torch.Tensor]]
    ) -> Iterator[tuple[PlainModule, str]]:
        from sdxl_lora_plugins.files.lowrank import of_matrix
        from sdxl_lora_plugins.files.plain import from_svd

        for layer, rank, difference in changed:
            svd = of_matrix(difference.flatten(1), rank)
            kept = float(svd.s.norm() / difference.norm())
            module = from_svd(layer, tuple(difference.shape), svd)
            yield module, f"rank {len(svd.s)}, {kept:.1%} of the norm"
