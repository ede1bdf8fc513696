"""What goes round once a step, in one flat tensor: gradients, and what else is to be summed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdxl_train.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class FlatExchange:
    """Puts gradients and other values into one fp32 tensor, and their sums back.

    Beside each gradient goes a flag that says whether there is one: module dropout leaves parts of
    a network without. A parameter that no process has a gradient for stays without.

    Args:
        views: Let gradients lie in the summed tensor, and spare copying each of them back.
        static: The same parameters have gradients in every step: the flags go once.
    """

    def __init__(self, *, views: bool = False, static: bool = False) -> None:
        self.views = views
        self.static = static
        self._present: list[bool] | None = None
        """Which parameters have a gradient in some process, once that is known for good."""

    def pack(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """Give what this process has to say: fp32 [n], n the same in all processes.

        Args:
            parameters: What trains, the same in all processes; none where an engine adds it up.
            values: fp32 [n] each, of the same sizes in all processes.

        Raises:
            TrainingError: If other parameters have gradients than before, against ``static``.
        """
        device = (*parameters, *values)[0].device
        present = [parameter.grad is not None for parameter in parameters]
        flags: list[Tensor] = []
        if self._present is None:
            flags = [torch.tensor(present, dtype=torch.float32, device=device)]
        # A process that had no sample in this step has no gradient at all.
        elif any(present) and present != self._present:
            raise TrainingError(
                "other parts of the network have gradients than in the first step, which "
                "--ddp_static_graph rules out: leave it out (module dropout does that)"
            )
        gradients = (
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten().float()
            for p in parameters
        )
        return torch.cat([*gradients, *flags, *(value.to(device) for value in values)])

    def unpack(
        self, sums: Tensor, parameters: Sequence[Tensor], values: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Set the gradients to their sums, and give the sums of the other values.

        Args:
            sums: The sum of what the processes packed.
            parameters: As packed.
            values: As packed.
        """
        sizes = [parameter.numel() for parameter in parameters]
        value_sizes = [value.numel() for value in values]
        flags = 0 if self._present else len(sizes)
        gradients, counted, summed = sums.split_with_sizes([sum(sizes), flags, sum(value_sizes)])
        present = self._present or [bool(count) for count in self._counts(counted, parameters)]
        if self.static:
            self._present = present
        parts = gradients.split_with_sizes(sizes)
        for parameter, total, is_there in zip(parameters, parts, present, strict=True):
            if is_there:
                self._set(parameter, total.view_as(parameter).to(parameter.dtype))
        return summed.clone().split_with_sizes(value_sizes)

    def _counts(self, counted: Tensor, parameters: Sequence[Tensor]) -> list[float]:
        """Give how many processes have a gradient of each; look only where it is not plain."""
        if all(parameter.grad is not None for parameter in parameters):
            return [1.0] * len(parameters)
        counts: list[float] = counted.tolist()  # waits for the device
        return counts

    def _set(self, parameter: Tensor, total: Tensor) -> None:
        if self.views:
            parameter.grad = total
        elif parameter.grad is None:
            parameter.grad = total.clone()
        else:
            parameter.grad.copy_(total)
