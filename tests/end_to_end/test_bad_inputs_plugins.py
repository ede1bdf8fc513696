"""Components that break their contract: the run names them instead of training something else.

The numbers are those of docs/bad-inputs.md. What is wrong with a plugin before it is used is told
in tests/core/test_host_*.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sdxl_train import TrainingError, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import Planned, TrainLora

WRONG = '''
"""Components that give the wrong thing, as they are told."""
import torch
from sdxl_train import Field, Loss, Network, Noise, Optimizer, Timesteps, Weighting, hookimpl


class Scalar(Loss):
    """One number for all."""

    def build(self, schedule):
        return lambda prediction, target, timesteps: ((prediction - target) ** 2).mean()


class BySample(Loss):
    """One number for each sample, which would be broadcast."""

    def build(self, schedule):
        return lambda prediction, target, timesteps: ((prediction - target) ** 2)[:, :1, :1, :1]


class Nothing(Loss):
    """Forgets to return."""

    def build(self, schedule):
        return lambda prediction, target, timesteps: None


class Late(Timesteps):
    """Behind the end of the schedule."""

    def build(self, schedule):
        return lambda n, generator: torch.full((n,), 1000)


class Early(Timesteps):
    """Before its beginning."""

    def build(self, schedule):
        return lambda n, generator: torch.full((n,), -1)


class Fractions(Timesteps):
    """No whole numbers."""

    def build(self, schedule):
        return lambda n, generator: torch.rand(n)


class Flat(Noise):
    """Noise without channels."""

    flat: bool = Field(False, description="Act.")

    def active(self):
        return self.flat

    def build(self, schedule):
        return lambda noise, latents, timesteps, generator: noise[:, :1]


class Whole(Weighting):
    """A weight for each element."""

    whole: bool = Field(False, description="Act.")

    def active(self):
        return self.whole

    def build(self, schedule):
        return lambda timesteps: torch.ones(len(timesteps), 4)


class Adapter:
    multiplier = 1.0

    def __init__(self, parameters):
        self.parameters = parameters

    def modules(self):
        return []

    def groups(self):
        from sdxl_train import ParameterGroup

        return [ParameterGroup(part="unet", name="unet", parameters=self.parameters)]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def metadata(self):
        return {}

    def prepare_step(self, timesteps):
        pass

    def detach(self):
        pass


class Empty(Network):
    """No parameters."""

    def build(self, model):
        return Adapter([])


class Computed(Network):
    """Parameters that are computed from others."""

    def build(self, model):
        return Adapter([torch.ones(2, requires_grad=True) * 2])


class Frozen(Network):
    """Parameters that do not train."""

    def build(self, model):
        return Adapter([torch.nn.Parameter(torch.ones(2), requires_grad=False)])


class Lonely(Optimizer):
    """No optimizer of torch."""

    def build(self, groups):
        return object()


@hookimpl
def register_losses():
    return {"scalar": Scalar, "by-sample": BySample, "nothing": Nothing}


@hookimpl
def register_timesteps():
    return {"late": Late, "early": Early, "fractions": Fractions}


@hookimpl
def register_noises():
    return {"flat": Flat}


@hookimpl
def register_weightings():
    return {"whole": Whole}


@hookimpl
def register_networks():
    return {"empty": Empty, "computed": Computed, "frozen": Frozen}


@hookimpl
def register_optimizers():
    return {"lonely": Lonely}
'''


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "wrong.py"
    path.write_text(WRONG, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"loss_type": "scalar"}, r"loss wrong:scalar gave a loss of shape \[\]"),
        ({"loss_type": "by-sample"}, r"loss wrong:by-sample .* \[2, 1, 1, 1\] .* \[2, 4, "),
        ({"loss_type": "nothing"}, "loss wrong:nothing gave a NoneType, expected a tensor"),
        ({"timestep_sampling": "late"}, "wrong:late gave timesteps from 1000 .* 0 to 999"),
        ({"timestep_sampling": "early"}, "timesteps wrong:early gave timesteps from -1 to -1"),
        ({"timestep_sampling": "fractions"}, "wrong:fractions .*float32, expected .*int64"),
        ({"flat": True}, r"noise wrong:flat gave noise of shape \[2, 1, \d, \d\]"),
        ({"whole": True}, r"weighting wrong:whole gave weights of shape \[2, 4\]"),
    ],
)
def test_what_a_component_gives_is_checked_and_blamed_108(
    changes: dict[str, object], fault: str, wrong: Path, train_lora: TrainLora
) -> None:
    with pytest.raises(TrainingError, match=fault):
        train_lora(plugin=[str(wrong)], max_train_steps=1, **changes)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("empty", "empty adapts no module of this model: nothing would train"),
        ("computed", "1 parameters of computed cannot be trained"),
        ("frozen", "1 parameters of frozen cannot be trained"),
    ],
)
def test_a_network_that_cannot_train_is_refused_109(
    name: str, fault: str, wrong: Path, planned: Planned
) -> None:
    words = ["--plugin", str(wrong), "--network_module", name]
    code, text = planned(words, network_alpha=None)
    assert code == 2
    assert fault in text


def test_an_optimizer_that_is_none_is_refused_110(wrong: Path, train_lora: TrainLora) -> None:
    with pytest.raises(UserError, match=r"lonely gave a object, expected a torch.optim.Optimizer"):
        train_lora(plugin=[str(wrong)], optimizer_type="lonely")
