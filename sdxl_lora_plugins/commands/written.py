"""What commands share that read networks and write a file."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from sdxl_train import Command, Field, Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch
    from tqdm import tqdm

    from sdxl_lora_plugins.files.base import BaseWeights
    from sdxl_lora_plugins.files.plain import OutputNaming, PlainFacts, PlainModule
    from sdxl_train.ldm import NetworkFile, StoredModule

Precision = Literal["input", "float", "fp16", "bf16"]
ItemT = TypeVar("ItemT")


class WritingCommand(Command):
    """A command whose result is a file."""

    short: ClassVar[Mapping[str, str]] = {"o": "save_to", "v": "verbose"}

    save_to: Path = Field(description="The .safetensors file to write; -o for short.")
    save_precision: Precision = Field(
        "input", description="Dtype of the result; input takes that of the first file."
    )
    overwrite: bool = Field(False, description="Replace a file that is there.")
    dry_run: bool = Field(False, description="List what would be done; write nothing.")
    verbose: bool = Field(False, description="Print a line for each layer; -v for short.")

    def output_problems(self, inputs: Sequence[Path]) -> Iterator[Problem]:
        """Yield why the result cannot be written where it should be."""
        if self.save_to.suffix != ".safetensors":
            yield Problem(
                place="--save_to",
                message=f"{self.save_to} is no .safetensors file",
                remedy=f"write {self.save_to.with_suffix('.safetensors').name}",
            )
        else:
            yield from self.place_problems(self.save_to, inputs)

    def place_problems(self, path: Path, inputs: Sequence[Path]) -> Iterator[Problem]:
        """Yield why a file or folder cannot be written under this name."""
        if any(path.resolve() == given.resolve() for given in inputs):
            yield Problem(
                place="--save_to",
                message=f"{path} is one of the inputs",
                remedy="name another file",
            )
        elif path.exists() and not self.overwrite:
            yield Problem(
                place="--save_to",
                message=f"{path} is there already",
                remedy="name another file, or give --overwrite",
            )
        elif not path.parent.is_dir():
            yield Problem(
                place="--save_to",
                message=f"there is no folder {path.parent}",
                remedy="make it first",
            )

    def dtype_or(self, stored: torch.dtype) -> torch.dtype:
        """Give the dtype of the result: the one asked for, or the one that is stored."""
        import torch

        named = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        return named.get(self.save_precision, stored)

    def write_lora(
        self,
        modules: Iterable[tuple[PlainModule, str]],
        metadata: Mapping[str, str],
        *,
        total: int,
        dtype: torch.dtype,
        naming: OutputNaming = "kohya",
        path: Path | None = None,
    ) -> list[PlainFacts]:
        """Write a plain LoRA under a progress bar.

        Args:
            modules: Each with what to say of it; made one by one.
            metadata: That of its origin.
            total: How many modules there may be.
            dtype: Of the tensors.
            naming: Of the tensors.
            path: The file, if it is not ``save_to``.

        Raises:
            UserError: If there is no module.
        """
        from sdxl_lora_plugins.files.plain import write_plain

        path = path or self.save_to

        def told() -> Iterator[PlainModule]:
            for module, remark in progress(modules, total=total, title=path.name):
                self.say(f"{module.layer.kohya}: {remark}")
                yield module

        facts = write_plain(path, told(), metadata, naming=naming, dtype=dtype)
        ranks = sorted({fact.rank for fact in facts})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        print(f"wrote {path}: {number(len(facts), 'layer')} of rank {span}")
        return facts

    def say(self, line: str) -> None:
        """Print a line about a layer, if that is asked for."""
        if self.verbose:
            from tqdm import tqdm

            tqdm.write(line)


def progress(
    items: Iterable[ItemT] = (), *, total: int, title: str, unit: str = "layer"
) -> tqdm[ItemT]:
    """Show how far the work is; nothing where nobody looks."""
    from tqdm import tqdm

    return tqdm(items, total=total, desc=title, unit=unit, disable=None, leave=False)


def number(count: int, noun: str) -> str:
    """Give a number of things: ``1 layer``, ``2 layers``."""
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"


def labelled(module: StoredModule) -> str:
    """Name a module's algorithm, and its rank if it has one: ``LoRA of rank 4``, ``LoKr``."""
    return module.title if module.rank is None else f"{module.title} of rank {module.rank}"


def require(problems: Sequence[Problem]) -> None:
    """Stop where something is wrong.

    Raises:
        UserError: With all of it.
    """
    if problems:
        raise UserError(problems)


def require_values(files: Sequence[NetworkFile]) -> None:
    """Stop where values of networks are not finite.

    Raises:
        UserError: With the names of their tensors.
    """
    from sdxl_train.ldm import value_problems

    require([problem for file in files for problem in value_problems(file)])


def open_base(path: Path, place: str) -> BaseWeights:
    """Open a base model.

    Raises:
        UserError: If it is none.
    """
    from sdxl_lora_plugins.files.base import BaseWeights
    from sdxl_train.ldm import BadFileError

    try:
        return BaseWeights(path)
    except BadFileError as error:
        raise UserError.of(place, error.fault.message, error.fault.remedy) from error


def base_or_none(path: Path | None) -> AbstractContextManager[BaseWeights | None]:
    """Open the base model that ``--sd_model`` names, if it names one.

    Raises:
        UserError: If it is none.
    """
    from contextlib import nullcontext

    return nullcontext() if path is None else open_base(path, "--sd_model")


def stored_dtype(file: NetworkFile) -> torch.dtype:
    """Give the dtype of the first factor of a network; fp16 where it is of 8 bits."""
    import torch

    with file.weights() as read:
        tensors: Mapping[str, torch.Tensor] = read(next(iter(file.modules.values())))
    dtype = max(tensors.values(), key=lambda tensor: tensor.numel()).dtype
    return dtype if dtype.itemsize > 1 else torch.float16


def no_plain_lora(
    files: Sequence[NetworkFile],
    *,
    has_base: bool,
    remedy: str = "name the base model with --sd_model",
) -> list[Problem]:
    """Say why networks cannot become a plain LoRA; ``remedy`` where the base model is wanted."""
    from sdxl_lora_plugins.files.plain import impossible
    from sdxl_train.ldm import counted

    return [
        Problem(
            place=str(file.path),
            message=f"{reason}: {counted(names, 'layer')}",
            remedy="" if has_base else remedy,
        )
        for file in files
        for reason, names in impossible(file, has_base=has_base).items()
    ]


def most_rank(module: StoredModule) -> int | None:
    """Give the rank that a module's delta can have at most, told by its shapes; None if unknown."""
    shape = module.weight_shape
    sides = [] if shape is None else [shape[0], _columns(shape)]
    if module.algorithm == "lora" and not module.is_dora and module.rank is not None:
        sides.append(module.rank)
    return min(sides) if sides else None


def _columns(shape: tuple[int, ...]) -> int:
    from math import prod

    return prod(shape[1:])
