"""What commands share that read networks and write a file."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING, Literal

from sdxl_train import Command, Field, Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from sdxl_lora_plugins.files import NetworkFile
    from sdxl_lora_plugins.files.base import BaseWeights

Precision = Literal["input", "float", "fp16", "bf16"]


class WritingCommand(Command):
    """A command whose result is a file."""

    save_to: Path = Field(description="The .safetensors file to write.")
    save_precision: Precision = Field(
        "input", description="Dtype of the result; input takes that of the first file."
    )
    overwrite: bool = Field(False, description="Replace a file that is there.")
    dry_run: bool = Field(False, description="Say what would be done; write nothing.")

    def output_problems(self, inputs: Sequence[Path]) -> Iterator[Problem]:
        """Yield why the result cannot be written where it should be."""
        if self.save_to.suffix != ".safetensors":
            yield Problem(place="--save_to", message=f"{self.save_to} is no .safetensors file")
        elif any(self.save_to.resolve() == path.resolve() for path in inputs):
            yield Problem(place="--save_to", message=f"{self.save_to} is one of the inputs")
        elif self.save_to.exists() and not self.overwrite:
            yield Problem(
                place="--save_to",
                message=f"{self.save_to} is there already",
                remedy="name another file, or give --overwrite",
            )
        elif not self.save_to.parent.is_dir():
            yield Problem(
                place="--save_to",
                message=f"there is no folder {self.save_to.parent}",
                remedy="make it first",
            )

    def dtype_or(self, stored: torch.dtype) -> torch.dtype:
        """Give the dtype of the result: the one asked for, or the one that is stored."""
        import torch

        named = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        return named.get(self.save_precision, stored)


def require(problems: Sequence[Problem]) -> None:
    """Stop where something is wrong.

    Raises:
        UserError: With all of it.
    """
    if problems:
        raise UserError(problems)


def open_base(path: Path, place: str) -> BaseWeights:
    """Open a base model.

    Raises:
        UserError: If it is none.
    """
    from sdxl_lora_plugins.files import BadFileError
    from sdxl_lora_plugins.files.base import BaseWeights

    try:
        return BaseWeights(path)
    except BadFileError as error:
        raise UserError.of(place, error.fault.message, error.fault.remedy) from error


def stored_dtype(file: NetworkFile) -> torch.dtype:
    """Give the dtype of the first factor of a network; fp16 where it is of 8 bits."""
    import torch

    with file.weights() as read:
        tensors: Mapping[str, torch.Tensor] = read(next(iter(file.modules.values())))
    dtype = max(tensors.values(), key=lambda tensor: tensor.numel()).dtype
    return dtype if dtype.itemsize > 1 else torch.float16


def no_plain_lora(files: Sequence[NetworkFile], *, has_base: bool) -> list[Problem]:
    """Say why networks cannot become a plain LoRA."""
    from sdxl_lora_plugins.files.plain import impossible
    from sdxl_lora_plugins.model.headers import counted

    return [
        Problem(
            place=str(file.path),
            message=f"{reason}: {counted(names, 'layer')}",
            remedy="" if has_base else "name the base model with --sd_model",
        )
        for file in files
        for reason, names in impossible(file, has_base=has_base).items()
    ]
