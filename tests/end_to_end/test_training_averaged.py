"""A run whose optimizer trains at other weights than those that it hands out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import SameTensors, TrainLora

AVERAGING = '''
"""SGD that trains at a point between its iterate z and the mean x of all z, and hands out x."""
import torch
from sdxl_train import Optimizer, hookimpl


class MeanSgd(torch.optim.Optimizer):
    beta = 0.7

    def __init__(self, groups):
        super().__init__(groups, {"training": False})

    def train(self):
        self._swap(True, 1 - self.beta)

    def eval(self):
        self._swap(False, 1 - 1 / self.beta)

    @torch.no_grad()
    def _swap(self, training, weight):
        for group in self.param_groups:
            if group["training"] != training:
                group["training"] = training
                for p in group["params"]:
                    if p in self.state:
                        p.lerp_(self.state[p]["z"], weight)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["training"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["z"], state["count"] = p.clone(), 0
                state["count"] += 1
                z = state["z"]
                x = p.lerp(z, 1 - 1 / self.beta)
                z.sub_(p.grad, alpha=group["lr"])
                x.lerp_(z, 1 / state["count"])
                p.copy_(x.lerp(z, 1 - self.beta))


class Mean(Optimizer):
    """Mean of iterates."""

    train_eval_modes = True

    def build(self, groups):
        return MeanSgd(groups)


@hookimpl
def register_optimizers():
    return {"mean": Mean}


@hookimpl
def step_finished(run, step):
    """Look at the run after every step, roughly."""
    with run.evaluation():
        torch.manual_seed(step.step)
        run.assembly.adapter.multiplier = 0.5
'''


@pytest.fixture(scope="module")
def averaged(train_lora: TrainLora, recorder: Path, tmp_path_factory: Any) -> Any:
    """Train with the optimizer above, watched or not, saving states."""

    def train(*, watched: bool = True, **changes: Any) -> Any:
        plugin = tmp_path_factory.mktemp("plugin") / "mean_sgd.py"
        plugin.write_text(AVERAGING if watched else AVERAGING.rpartition("\n@hookimpl")[0])
        changes = {"optimizer_type": "mean", "learning_rate": 0.1, "save_state": True, **changes}
        return train_lora(plugin=[str(recorder), str(plugin)], **changes)

    return train


def test_files_hold_the_weights_that_the_optimizer_hands_out(averaged: Any) -> None:
    run = averaged()
    (state,) = run.folder.glob("*-state")
    trained = load_file(state / "parameters.safetensors")
    iterates = load_file(state / "optimizer.safetensors")
    moved = 0
    for key, z in iterates.items():
        if not key.startswith("optimizer."):
            continue
        y = trained[key.split(".")[2]]
        x = y.lerp(z, 1 - 1 / 0.7)
        alike = [t for t in run.tensors.values() if t.shape == x.shape]
        assert any(torch.equal(x, tensor) for tensor in alike)
        moved += not any(torch.equal(y, tensor) for tensor in alike)
    assert moved > len(trained) / 2


def test_looking_at_such_a_run_does_not_change_it(averaged: Any, same_tensors: SameTensors) -> None:
    assert same_tensors(averaged().tensors, averaged(watched=False).tensors)


def test_such_a_run_resumes_exactly(averaged: Any, same_tensors: SameTensors) -> None:
    whole = averaged()
    half = averaged(max_train_steps=2)
    resumed = averaged(resume=str(half.folder / "photo-state"))
    assert same_tensors(resumed.tensors, whole.tensors)


def test_schedule_free_hands_out_the_mean_and_saving_changes_nothing(
    train_lora: TrainLora, same_tensors: SameTensors
) -> None:
    """x = y + (1 - 1 / beta) (z - y), for y = (1 - beta) z + beta x (Defazio et al. 2024)."""
    options: dict[str, Any] = {"optimizer_type": "AdamWScheduleFree", "learning_rate": 1e-2}
    run = train_lora(**options, save_state=True, save_every_n_steps=1, validation_split=0.2)
    trained = load_file(run.folder / "photo-state" / "parameters.safetensors")
    kept = load_file(run.folder / "photo-state" / "optimizer.safetensors")
    iterates = {key.split(".")[2]: tensor for key, tensor in kept.items() if key.endswith(".z")}
    assert len(iterates) > 300
    for index, z in iterates.items():
        x = trained[index].lerp(z, 1 - 1 / 0.9)
        assert any(
            t.shape == x.shape and torch.allclose(x, t, atol=1e-7) for t in run.tensors.values()
        )
    assert not same_tensors(run.tensors, run.initial)
    quiet = train_lora(**options, validation_split=0.2, validate_every_n_epochs=0)
    assert same_tensors(run.tensors, quiet.tensors)
