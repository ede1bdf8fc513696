"""The caches of a run, filled ahead or cleared of what it would not use, without the training."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from sdxl_train.accelerator import make_accelerator
from sdxl_train.assembly import assemble
from sdxl_train.blame import blame
from sdxl_train.data.pruning import Pruned, prune
from sdxl_train.process_group import join
from sdxl_train.supply import Supply

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.preflight import Prepared


def fill_caches(prepared: Prepared, *, imports_latents: bool = False) -> None:
    """Fill the caches that a run would fill, and end there.

    Args:
        prepared: The run.
        imports_latents: Take over another program's latents where they can be verified.

    Raises:
        UserError: If the machine cannot do what the options ask, or a cache cannot be written.
        TrainingError: If an image cannot be read.
    """
    with _encoding(prepared, imports_latents=imports_latents) as supply:
        supply.fill_caches()


def prune_caches(prepared: Prepared) -> list[Pruned]:
    """Remove the files of a run's caches that the run would not use.

    Raises:
        UserError: If a file cannot be removed.
    """
    with _encoding(prepared) as supply:
        return list(prune(supply.disk_entries()))


@contextmanager
def _encoding(prepared: Prepared, *, imports_latents: bool = False) -> Iterator[Supply]:
    """Make what encodes images and captions, exactly as a run does, networks to merge included."""
    try:
        ranks = join(prepared.config.processes)
        accelerator = make_accelerator(prepared.config)
        device = accelerator.device
        with ranks.together():
            model = assemble(prepared.config, device, prepared.seed).model
            supply = Supply(
                prepared,
                model,
                device,
                accelerator.autocast,
                trains_text=False,
                ranks=ranks,
                imports_latents=imports_latents,
            )
            yield supply
            supply.close()
    except BaseException as error:
        blame(error, prepared.host.enabled.values())
        raise
