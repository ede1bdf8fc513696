"""A learning rate that falls along a power of the time that is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import Field, Scheduler

if TYPE_CHECKING:
    from sdxl_train import StepPlan
    from torch.optim import Optimizer as TorchOptimizer
    from torch.optim.lr_scheduler import LRScheduler


class ExampleScheduler(Scheduler):
    """A linear warm-up, then ``(1 - progress) ** power``."""

    power: float = Field(0.5, gt=0, description="Below 1 the rate stays high for longer.")

    def build(self, optimizer: TorchOptimizer, steps: StepPlan) -> LRScheduler:
        """Build the schedule, counted in optimizer steps."""
        from torch.optim.lr_scheduler import LambdaLR

        def factor(step: int) -> float:
            if step < steps.warmup:
                return step / steps.warmup
            left = (steps.total - step) / max(1, steps.total - steps.warmup)
            return float(max(0.0, left) ** self.power)

        return LambdaLR(optimizer, factor)
