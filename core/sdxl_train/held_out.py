"""Validation as a run goes: when it is due, in which processes, and when it ends the run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sdxl_train.rng import derive_seed
from sdxl_train.validation import (
    Validation,
    best_of,
    patience_is_over,
    validation_due,
    validation_timesteps,
)

if TYPE_CHECKING:
    from sdxl_train.built import Built
    from sdxl_train.observed import RunResult
    from sdxl_train.preflight import Prepared
    from sdxl_train.ranks import Ranks
    from sdxl_train.supply import Supply
    from sdxl_train.validation import ValidationResult

logger = logging.getLogger(__name__)


class HeldOut:
    """The held-out images of a run, if it has any.

    Args:
        prepared: The run.
        built: What is measured.
        supply: Gives the images.
        ranks: The main one of the processes measures; the others learn of it.
        result: Gets the losses.
    """

    def __init__(
        self, prepared: Prepared, built: Built, supply: Supply, ranks: Ranks, result: RunResult
    ) -> None:
        self.prepared = prepared
        self.config = prepared.config
        self.evaluation = built.evaluation
        self.ranks = ranks
        self.result = result
        limit = self.config.training.max_validation_steps
        self._validation: Validation | None = None
        if prepared.validation is not None:
            self._validation = Validation(
                step=built.step,
                batches=lambda: supply.validation(limit),
                seed=derive_seed(self.config.dataset.validation_seed or 0, "validation"),
                timesteps=validation_timesteps(self.config, built.model),
            )

    def measure(self, step: int, epoch: int) -> ValidationResult | None:
        """Measure the loss after a step; None if nothing is held out or it is not time."""
        due = validation_due(self.config, self.prepared.counts, step)
        if self._validation is None or not due:
            return None
        measured = None
        with self.evaluation.pause():
            if self.ranks.main:
                measured = self._validation.after(step, epoch, due)
        # The others stop with it, when the loss has not fallen for long.
        result = self.ranks.from_main(measured)
        assert result is not None
        self.result.validations.append(result)
        return result

    def is_out_of_patience(self) -> bool:
        """Tell whether to stop because the loss has not fallen for long."""
        results, patience = self.result.validations, self.config.training.early_stop_patience
        early = self.result.steps < self.prepared.counts.total
        if early and patience_is_over(results, patience) and not self.result.stopped_early:
            self.result.stopped_early = True
            best = best_of(results)
            logger.info(
                "stopped early after step %d: %d times in a row the loss on held-out images was "
                "no lower than %s",
                self.result.steps,
                patience,
                f"{best.loss:.4f} after step {best.step}" if best else "any",
            )
        return self.result.stopped_early
