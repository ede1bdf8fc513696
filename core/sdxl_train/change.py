"""Whether training changes anything at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdxl_train.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sdxl_train.loop import StepResult

STEPS_TO_CHANGE = 10
"""Steps with a rate above 0 in which some weight must have changed."""


class ChangeCheck:
    """Sees to it that the first steps change a weight; looks no more once one has.

    A network with dead parameters, an optimizer over copies or a rate that rounds away would
    otherwise train for hours and save what it began with.

    Args:
        parameters: What trains.
        silent_steps: The first steps of a run, which the optimizer may let pass.
    """

    def __init__(self, parameters: Sequence[Tensor], *, silent_steps: int = 0) -> None:
        self._parameters = list(parameters)
        self._before: Tensor | None = self._fingerprint()
        self._silent_steps = silent_steps
        self._steps = 0

    def after(self, step: StepResult) -> None:
        """Look after a step.

        Raises:
            TrainingError: If enough steps have changed nothing.
        """
        if self._before is None or step.skipped or not any(step.learning_rates.values()):
            return
        if step.step <= self._silent_steps:
            return
        self._steps += 1
        if not torch.equal(self._fingerprint(), self._before):
            self._before = None
        elif self._steps >= STEPS_TO_CHANGE:
            raise TrainingError(self._text())

    def conclude(self) -> None:
        """Look at the end of a run that was too short to be stopped.

        Raises:
            TrainingError: If its steps changed nothing.
        """
        if self._before is not None and self._steps:
            raise TrainingError(self._text())

    def _text(self) -> str:
        return (
            f"nothing trains: {self._steps} steps with a learning rate above 0 have changed no "
            f"weight of the network. Likely causes: a rate too small for the type of the weights, "
            f"an optimizer that does nothing, or a network that the model does not use"
        )

    def _fingerprint(self) -> Tensor:
        """Give two numbers for each parameter that a change of its values changes, fp64 [2 n]."""
        with torch.no_grad():
            norms = torch._foreach_norm(self._parameters, dtype=torch.float64)
            sums = [parameter.sum(dtype=torch.float64) for parameter in self._parameters]
            return torch.stack([*norms, *sums])
