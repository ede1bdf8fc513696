"""The step of a run, built of the components that were chosen."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sdxl_train.checked import checked_loss, checked_noise, checked_timesteps, checked_weights
from sdxl_train.loop import Step
from sdxl_train.protocols import LimitedAdapter
from sdxl_train.rng import Streams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor
    from torch.optim.lr_scheduler import LRScheduler

    from sdxl_train.assembly import Assembly
    from sdxl_train.config import RunConfig
    from sdxl_train.data.batches import Batch
    from sdxl_train.protocols import Adapter, LoadedModel, NoiseTransform
    from sdxl_train.update import Update

logger = logging.getLogger(__name__)


def build_step(
    config: RunConfig,
    assembly: Assembly,
    update: Update,
    scheduler: LRScheduler,
    *,
    seed: int,
    lap: Callable[[str], None],
) -> Step:
    """Build what one optimizer step calls.

    Args:
        config: The components.
        assembly: The model and the network.
        update: Makes of gradients an update.
        scheduler: Steps with the optimizer.
        seed: Of the run; every draw derives from it.
        lap: Told of each phase as it ends.
    """
    model, adapter = assembly.model, assembly.adapter
    schedule = model.schedule
    pairs = zip(config.entries, config.components, strict=True)
    names = {id(component): f"{entry.kind.name} {entry.qualified}" for entry, component in pairs}

    def noises(phase: str) -> list[NoiseTransform]:
        chosen = [noise for noise in config.noises if noise.phase == phase]
        return [checked_noise(names[id(noise)], noise.build(schedule)) for noise in chosen]

    why = update.why_at_once()
    if why and update.accelerator.device.type == "cuda":
        logger.info("each step waits for the device: %s", why)
    return Step(
        timesteps=checked_timesteps(
            names[id(config.timesteps)], config.timesteps.build(schedule), schedule.num_timesteps
        ),
        target_noises=noises("target"),
        input_noises=noises("input"),
        add_noise=schedule.add_noise,
        condition=lambda batch: _condition(model, batch),
        prepare_step=adapter.prepare_step,
        predict=model.predict,
        target=model.target,
        without_network=lambda: _without(adapter),
        loss=checked_loss(names[id(config.loss)], config.loss.build(schedule)),
        weightings=[
            checked_weights(names[id(weighting)], weighting.build(schedule))
            for weighting in config.weightings
        ],
        streams=Streams(seed, update.accelerator.device),
        autocast=update.accelerator.autocast,
        backward=update.backward,
        add_up=update.add_up,
        gather=update.ranks.gather,
        clip=update.clip,
        steps_in_backward=update.steps_in_backward,
        limit_weights=adapter.limit_weights if isinstance(adapter, LimitedAdapter) else dict,
        lap=lap,
        optimizer=update.optimizer,
        scheduler=scheduler,
        normalize_masks=config.dataset.masked_loss_normalize,
        hold_back=None if why else update.hold_back,
        was_skipped=update.was_skipped if update.may_skip else None,
    )


def _condition(model: LoadedModel, batch: Batch) -> Mapping[str, Tensor]:
    text = model.encode_text(batch.captions) if batch.text is None else batch.text
    return {
        **text,
        "original_size": batch.original_size,
        "crop_top_left": batch.crop_top_left,
        "target_size": batch.target_size,
    }


@contextmanager
def _without(adapter: Adapter) -> Iterator[None]:
    multiplier, adapter.multiplier = adapter.multiplier, 0.0
    try:
        yield
    finally:
        adapter.multiplier = multiplier
