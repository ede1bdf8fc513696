"""``sdxl-train demo``: a LoRA's whole life, on a model and pictures made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from sdxl_train import Command, Field


class Demo(Command):
    """Train a LoRA on a tiny model made on the spot, and show its effect in pictures.

    Needs no input, no network and about a minute of two CPU cores. The folder holds everything
    afterwards: the base model, the training pictures, the options of the run, the LoRA and
    pictures drawn without and with it.
    """

    positional: ClassVar[tuple[str, ...]] = ("dir",)

    dir: Path = Field(
        Path("sdxl-train-demo"),
        description="Folder to make. An earlier demo in it is replaced; anything else is refused.",
    )
    base_steps: int = Field(
        300,
        ge=20,
        description="Training steps of the base model. With fewer it is made faster, draws worse.",
    )
    steps: int = Field(120, ge=1, description="Training steps of the LoRA.")

    def run(self) -> int:
        """Make the model and the pictures, train, and compare.

        Raises:
            UserError: If the folder cannot be used.
        """
        from sdxl_lora_plugins.commands.demo_folder import DemoFolder

        folder = DemoFolder.claim(self.dir)

        # Only now, when the folder is known to be right, is torch worth its import.
        from sdxl_lora_plugins.commands.demo_run import run_demo

        return run_demo(folder, base_steps=self.base_steps, steps=self.steps)
