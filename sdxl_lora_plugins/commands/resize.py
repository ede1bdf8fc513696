"""``sdxl-train resize``: a network of lower rank."""

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

    from torch import Tensor

    from sdxl_lora_plugins.files import NetworkFile
    from sdxl_lora_plugins.files.plain import PlainModule


class Resize(WritingCommand):
    """Lower the ranks of a network, layer by layer, to what its deltas need.

    Each delta is decomposed into singular values and the largest are kept: the best matrix of that
    rank. The result is a plain LoRA in kohya's naming, whatever the network was.
    """

    positional: ClassVar[tuple[str, ...]] = ("model",)

    model: Path = Field(description="The network.")
    new_rank: int = Field(ge=1, description="Rank of every layer, or the most with a method.")
    new_conv_rank: int | None = Field(
        None, ge=1, description="The same for 3x3 convolutions; new_rank if not given."
    )
    dynamic_method: Literal["sv_ratio", "sv_fro", "sv_cumulative"] | None = Field(
        None,
        description="Choose each layer's rank: sv_ratio keeps singular values of at least the "
        "largest / dynamic_param; sv_fro and sv_cumulative the fewest that hold this share of the "
        "Frobenius norm, or of the sum of all.",
    )
    dynamic_param: float | None = Field(None, gt=0, description="What the method needs.")
    sd_model: Path | None = Field(
        None, description="The base model, where the deltas depend on it (DoRA, OFT, IA3)."
    )

    def run(self) -> int:
        """Decompose, cut and write."""
        problems = [*self.output_problems([self.model]), *self._method_problems()]
        files = open_networks([self.model], problems)
        require(problems + no_plain_lora(files, has_base=self.sd_model is not None))
        from sdxl_lora_plugins.files.plain import write_plain

        modules = []
        for module, kept in self._resized(files[0]):
            print(f"{module.layer.kohya}: rank {module.rank}, {kept:.1%} of the norm")
            modules.append(module)
        if not self.dry_run:
            dtype = self.dtype_or(stored_dtype(files[0]))
            write_plain(self.save_to, modules, files[0].metadata, dtype=dtype)
            print(f"wrote {self.save_to}")
        return 0

    def _method_problems(self) -> Iterator[Problem]:
        if (self.dynamic_method is None) != (self.dynamic_param is None):
            yield Problem(
                place="--dynamic_method", message="is given only together with --dynamic_param"
            )
        elif self.dynamic_method is not None and self.dynamic_param is not None:
            is_ratio = self.dynamic_method == "sv_ratio"
            if (self.dynamic_param < 1) if is_ratio else (self.dynamic_param > 1):
                bound = "at least 1" if is_ratio else "at most 1"
                yield Problem(
                    place="--dynamic_param",
                    message=f"{self.dynamic_param} is not {bound}, as {self.dynamic_method} needs",
                )

    def _resized(self, file: NetworkFile) -> Iterator[tuple[PlainModule, float]]:
        """Yield modules, and the share of the Frobenius norm that they keep."""
        from contextlib import nullcontext
        from math import prod

        from sdxl_lora_plugins.files.plain import decompose, from_svd, weight_shape

        opened = open_base(self.sd_model, "--sd_model") if self.sd_model else nullcontext()
        with file.weights() as read, opened as base:
            for module in file.modules.values():
                tensors = read(module)
                weight = base.weight(module.layer) if base and module.needs_base else None
                shape = weight_shape(module, weight)
                whole = decompose(module, tensors, weight)
                is_wide = prod(shape[2:]) > 1
                most = (is_wide and self.new_conv_rank) or self.new_rank
                cut = whole.cut(min(most, self._rank(whole.s)))
                norm = float(whole.s.norm())
                yield (
                    from_svd(module.layer, shape, cut),
                    float(cut.s.norm()) / norm if norm else 1.0,
                )

    def _rank(self, values: Tensor) -> int:
        """Give the rank that the method wants for singular values [k], descending; at least 1."""
        if self.dynamic_param is None or not values[0]:
            return len(values) if self.dynamic_param is None else 1
        if self.dynamic_method == "sv_ratio":
            return int((values >= values[0] / self.dynamic_param).sum())
        parts = values.double()
        share = self.dynamic_param
        if self.dynamic_method == "sv_fro":
            parts, share = parts.square(), share**2
        sums = parts.cumsum(0) / parts.sum()
        return min(int((sums < share).sum()) + 1, len(values))
