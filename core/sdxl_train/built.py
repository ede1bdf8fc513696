"""What a run trains with: the model and its network, the optimizer, its schedule, the step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_train.assembly import assemble, build_optimizer
from sdxl_train.evaluation import Evaluation
from sdxl_train.process_group import digest
from sdxl_train.resume import dataset_digest, shaping_options
from sdxl_train.step_building import build_step
from sdxl_train.update import make_update

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator
    from torch.optim.lr_scheduler import LRScheduler

    from sdxl_train.assembly import Assembly
    from sdxl_train.loop import Step
    from sdxl_train.preflight import Prepared
    from sdxl_train.protocols import LoadedModel
    from sdxl_train.ranks import Ranks
    from sdxl_train.update import Update

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a run trains with.

    Attributes:
        accelerator: The device and its precision.
        assembly: The model and the network.
        evaluation: Lets training stand still.
        scheduler: Steps with the optimizer, which ``update`` has.
        update: Makes of gradients an update.
        step: What an optimizer step calls.
    """

    accelerator: Accelerator
    assembly: Assembly
    evaluation: Evaluation
    scheduler: LRScheduler
    update: Update
    step: Step

    @property
    def model(self) -> LoadedModel:
        """The model."""
        return self.assembly.model

    @property
    def trains_text(self) -> bool:
        """Whether a text encoder is adapted, so that captions are encoded in each step."""
        return any(part.module is not self.model.denoiser for part in self.model.parts)

    def facts(self, prepared: Prepared) -> dict[str, str]:
        """Give what must be the same in every process, as digests."""
        model = self.model
        modules = [model.denoiser, *(model.text_encoders if self.trains_text else ())]
        # Biases and norms tell two fine-tunes apart, and take no time.
        vectors = [p for module in modules for p in module.parameters() if p.ndim == 1]
        return {
            "options": repr(shaping_options(prepared.config)),
            "dataset": dataset_digest(prepared.scan),
            "base model": digest(vectors),
            "text encoders": "" if self.trains_text else repr(model.text_encoders_identity()),
            "network weights": digest(self.assembly.parameters),
        }


def build(
    prepared: Prepared, accelerator: Accelerator, ranks: Ranks, lap: Callable[[str], None]
) -> Built:
    """Build what a run trains with, from the model to the step.

    Args:
        prepared: The run.
        accelerator: Its device and precision.
        ranks: Its processes.
        lap: Told of each phase of a step as it ends.

    Raises:
        UserError: If the machine or a component cannot do what the options ask.
    """
    config, device = prepared.config, accelerator.device
    logger.info("device %s, mixed precision %s", device, config.training.mixed_precision)
    assembly = assemble(config, device, prepared.seed)
    optimizer = build_optimizer(config, assembly.groups)
    if config.optimizer.train_eval_modes:
        optimizer.train()  # type: ignore[attr-defined]
    # Before the update, which wraps the method that a schedule replaces.
    scheduler = config.build_schedule(optimizer, prepared.counts.step_plan)
    update = make_update(config, accelerator, ranks, optimizer, assembly.parameters)
    return Built(
        accelerator=accelerator,
        assembly=assembly,
        evaluation=Evaluation(
            assembly,
            optimizer,
            swaps_weights=config.optimizer.train_eval_modes,
            autocast=accelerator.autocast,
        ),
        scheduler=scheduler,
        update=update,
        step=build_step(config, assembly, update, scheduler, seed=prepared.seed, lap=lap),
    )
