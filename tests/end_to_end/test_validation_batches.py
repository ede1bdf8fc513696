"""The batches to validate on, as a run supplies them: the same each time, cached or not."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from sdxl_train.assembly import assemble
from sdxl_train.preflight import prepare
from sdxl_train.ranks import ALONE
from sdxl_train.settings import from_mapping
from sdxl_train.supply import Supply

if TYPE_CHECKING:
    from sdxl_train.data.batches import Batch
    from tests.end_to_end.conftest import MakeOptions

CPU = torch.device("cpu")


def supplied(options: dict[str, Any]) -> list[list[Batch]]:
    prepared = prepare(from_mapping(options))
    assert prepared.validation is not None
    model = assemble(prepared.config, CPU, prepared.seed).model
    supply = Supply(prepared, model, CPU, nullcontext, trains_text=True, ranks=ALONE)
    supply.fill_caches()
    rounds = [list(supply.validation()) for _ in range(2)]
    assert len(rounds[0]) == prepared.validation.batches_per_epoch
    assert [batch.keys for batch in supply.validation(1)] == [rounds[0][0].keys]
    supply.close()
    return rounds


def test_validation_batches_are_the_same_each_time_and_with_caches(options: MakeOptions) -> None:
    changes = {"validation_split": 0.6, "flip_aug": True, "network_train_unet_only": True}
    first, second = supplied(options(**changes))
    assert sorted(len(batch) for batch in first) == [1, 2]
    cached, again = supplied(
        options(cache_latents=True, cache_text_encoder_outputs=True, seed=5, **changes)
    )
    for batches in (second, cached, again):
        for ours, theirs in zip(first, batches, strict=True):
            assert ours.keys == theirs.keys
            assert ours.captions == theirs.captions
            assert ours.latents is not None
            assert theirs.latents is not None
            assert torch.equal(ours.latents, theirs.latents)
    assert all(batch.text is not None for batch in cached)
