"""An exponential moving average of the network's weights, saved beside it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

from sdxl_train import Field, Observer, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from sdxl_train import Run, RunConfig, StepResult

logger = logging.getLogger(__name__)


class Ema(Observer):
    """Average of the weights over the last steps, saved as NAME-ema beside each network.

    After step ``t`` the average is ``d average + (1 - d) weights`` with ``d = min(ema_decay,
    (1 + t) / (10 + t))``, so that it does not dwell on the first weights (the schedule of
    TensorFlow's ``ExponentialMovingAverage`` and of diffusers' ``EMAModel``).
    """

    averages: ClassVar[bool] = True

    ema_decay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Save an average of the weights too, that keeps this share each step (0.999).",
    )

    def active(self) -> bool:
        """Tell whether an average is wanted."""
        return self.ema_decay is not None

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse to average what is an average already."""
        if config.optimizer.train_eval_modes:
            yield Problem(
                place=f"{config.place('ema_decay')}, {config.place('optimizer_type')}",
                message=f"{config.name_of('optimizer')} averages the weights itself",
                remedy="leave --ema_decay out",
            )

    def build(self, run: Run) -> object:
        """Build the average of the weights as they are now."""
        assert self.ema_decay is not None
        return _Average(run, self.ema_decay)


class _Average:
    """Follows the weights in fp32, one step at a time, whoever asks first."""

    def __init__(self, run: Run, decay: float) -> None:
        self.decay = decay
        self.step = run.first_step
        self._parameters = run.assembly.parameters
        self._weights = [p.detach().float().clone() for p in self._parameters]

    def step_finished(self, step: StepResult) -> None:
        self.average_after(step.step)

    def average_after(self, step: int) -> Sequence[Tensor]:
        from torch.optim.swa_utils import get_ema_multi_avg_fn

        if step > self.step:
            self.step = step
            decay = min(self.decay, (1 + step) / (10 + step))
            follow: Any = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            follow(self._weights, [p.detach().float() for p in self._parameters], None)
        return self._weights

    def state_after(self, step: int) -> dict[str, Any]:
        return {"weights": list(self.average_after(step))}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        if state is None:
            logger.warning("the state holds no average of the weights: it begins with these")
            return
        for weights, saved in zip(self._weights, state["weights"], strict=True):
            weights.copy_(saved)
