"""A command that counts what a network trains."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from sdxl_train import Command, Field, UserError


class ExampleCommand(Command):
    """Count the parameters of a network file."""

    positional: ClassVar[tuple[str, ...]] = ("network",)

    network: Path = Field(description="A .safetensors file.")

    def run(self) -> int:
        """Print the count.

        Raises:
            UserError: If there is no such file, or it is no safetensors file.
        """
        from safetensors import SafetensorError, safe_open

        if not self.network.is_file():
            raise UserError.of(str(self.network), "does not exist", "name a .safetensors file")
        try:
            with safe_open(self.network, framework="pt") as file:
                shapes = [file.get_slice(name).get_shape() for name in file.keys()]
        except SafetensorError as error:
            raise UserError.of(str(self.network), f"is no safetensors file: {error}") from None
        total = 0
        for shape in shapes:
            count = 1
            for side in shape:
                count *= side
            total += count
        print(f"{len(shapes)} tensors, {total} parameters")
        return 0
