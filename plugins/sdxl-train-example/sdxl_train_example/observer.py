"""A file with a line for each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import Field, Observer

if TYPE_CHECKING:
    from pathlib import Path

    from sdxl_train import Run, StepResult


class ExampleObserver(Observer):
    """Writes the loss of each step to ``NAME.losses.csv``."""

    example_losses: bool = Field(False, description="Write NAME.losses.csv.")

    def active(self) -> bool:
        """Tell whether the file is wanted."""
        return self.example_losses

    def build(self, run: Run) -> object:
        """Build what hears the events."""
        return LossFile(run.output_dir / f"{run.name}.losses.csv")


class LossFile:
    """The file. Its methods are named after the events that it hears."""

    def __init__(self, path: Path) -> None:
        """Start with what a run before this one wrote, if it goes on from there."""
        self.path = path

    def step_finished(self, step: StepResult) -> None:
        """Add a line. Reading the loss waits for the device; a tracker does it less often."""
        with self.path.open("a", encoding="utf-8") as file:
            print(step.step, step.loss.item(), sep=",", file=file)
