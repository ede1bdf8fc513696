"""T-LoRA keeps the contract of networks; its rank follows the timestep as the paper says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdxl_train.testing import NetworkContract
from sdxl_train_tlora import TLora

if TYPE_CHECKING:
    from sdxl_train.testing import TinyModel, TrainTiny


class TestTLora(NetworkContract):
    component = TLora
    options = {"network_dim": 4, "min_rank": 1}
    loads_in_diffusers = True


class TestTLoraWithoutOrthogonality(NetworkContract):
    component = TLora
    options = {"network_dim": 4, "orthogonal": False, "rank_power": 2.0}
    model_options = {"network_train_unet_only": True}


@pytest.mark.parametrize(
    ("timestep", "acting"),
    # min_rank + floor((r - min_rank) (1 - t/1000)^power) for r = 8, min_rank = 2
    [(0, 8), (1, 7), (500, 5), (999, 2)],
)
def test_ranks_that_act_follow_the_timestep(
    tiny_model: TinyModel, timestep: int, acting: int
) -> None:
    model = tiny_model.load("meta", network_train_unet_only=True)
    adapter: Any = TLora(network_dim=8, min_rank=2).build(model)

    adapter.prepare_step(torch.tensor([timestep, 0]))

    assert adapter._mask.sum(1).tolist() == [acting, 8]


def test_ranks_that_do_not_act_get_no_gradient(tiny_model: TinyModel) -> None:
    from sdxl_train.testing.predictions import Predictions

    model = tiny_model.load(network_train_unet_only=True)
    questions = Predictions(model, pixels=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter: Any = TLora(network_dim=4, min_rank=2).build(model)
    torch.autograd.backward(questions.make(adapter, timestep=999).sum())
    delta = next(
        d for d in adapter._deltas.values() if d.up.grad is not None and d.up.grad.abs().sum() > 0
    )

    assert delta.up.grad[:, 2:].abs().max() == 0
    assert delta.down.grad[2:].abs().max() == 0


def test_a_run_trains_and_names_it(train_tiny: TrainTiny) -> None:
    run = train_tiny(
        network_module="tlora", network_dim=4, network_args={"min_rank": 2}, learning_rate=1e-2
    )

    assert run.metadata["ss_network_module"] == "tlora"
    assert run.result.steps == 3


def test_more_ranks_at_the_least_than_there_are_is_refused(train_tiny: TrainTiny) -> None:
    from sdxl_train import UserError

    with pytest.raises(UserError, match="5 ranks of 4 cannot act"):
        train_tiny(network_module="tlora", network_dim=4, network_args={"min_rank": 5})
