"""The further optimizers: sd-scripts' trajectories, their contracts, and every one that resumes."""

from __future__ import annotations

import ast
import gzip
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from sdxl_lora_plugins.schedulers import ConstantWithWarmup
from sdxl_train import SdxlTrainError
from sdxl_train.testing import OptimizerContract
from sdxl_train.testing.state_files import through_a_file
from sdxl_train_optimizers import came, d_adaptation, lion, register_optimizers, schedule_free
from sdxl_train_optimizers.further import BY_PATH, FURTHER, LEFT_OUT, FromPytorchOptimizer

OPTIMIZERS: dict[str, Any] = dict(register_optimizers())
GOLDEN = Path(__file__).parent / "data" / "optimizers_further.json.gz"
LORA_SHAPES = ((4, 8), (8, 4), (6,), (4, 2, 3, 3), (4, 4, 1, 1))
"""Down and up of a linear layer, a vector of magnitudes, down and up of a convolution."""


def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(GOLDEN.read_bytes()))
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["name"])
def test_optimizers_take_the_golden_steps(row: dict[str, Any]) -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(8, 128))
    q = torch.nn.Parameter(torch.randn(64))
    target = torch.randn(8, 128)
    pairs = (pair.split("=") for pair in row["args"])
    component = OPTIMIZERS[row["name"].removeprefix("came_pytorch.")]
    made = component(**{name: ast.literal_eval(value) for name, value in pairs})
    optimizer = made.build([{"params": [p, q], "lr": row["lr"], "name": "all"}])
    if component.train_eval_modes:
        optimizer.train()
    for step in row["trajectory"]:
        loss = torch.nn.functional.mse_loss(p, target) + q.square().mean()
        assert loss.item() == pytest.approx(step["loss"], rel=1e-6)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        assert p.flatten()[:4].tolist() == pytest.approx(step["p0"], abs=1e-6)
        assert q[:4].tolist() == pytest.approx(step["q0"], abs=1e-6)
    if component.train_eval_modes:
        optimizer.eval()
        assert p.flatten()[:4].tolist() == pytest.approx(row["eval_p0"], abs=1e-6)


NEEDED: dict[str, dict[str, Any]] = {
    "Ranger21": {"num_iterations": 40},
    "BSAM": {"num_data": 10},
}
"""Options that have no default."""


class Trial:
    """Factors of a LoRA on their way to a random point, as the loop trains them."""

    def __init__(self, name: str, **options: Any) -> None:
        component: Any = FromPytorchOptimizer.of(f"pytorch_optimizer.{name}").resolved()
        needed = NEEDED.get(name, {})
        rate = 1.0 if component.single_lr else 1e-3
        draw = torch.Generator().manual_seed(0)
        self.parameters = [
            torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in LORA_SHAPES
        ]
        self.parameters[1].data.zero_()
        self.target = [torch.randn(shape, generator=draw) for shape in LORA_SHAPES]
        self.optimizer = component(learning_rate=rate, **needed, **options).build(
            [
                {"params": self.parameters[:3], "lr": rate, "name": "unet"},
                {"params": self.parameters[3:], "lr": rate, "name": "text"},
            ]
        )
        if component.train_eval_modes:
            self.optimizer.train()
        self.schedule = LambdaLR(self.optimizer, lambda step: 1.0)

    def steps(self, first: int, last: int) -> None:
        for number in range(first, last):
            # As the loop does before each update; Kron draws from numpy's.
            torch.manual_seed(number)
            np.random.seed(number)
            pairs = zip(self.parameters, self.target, strict=True)
            torch.autograd.backward(sum(((p - t).square().sum() for p, t in pairs)) / 100)  # type: ignore[arg-type]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.schedule.step()

    def values(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def resumed(self, name: str, folder: Path) -> Trial:
        other = Trial(name)
        for mine, theirs in zip(other.parameters, self.parameters, strict=True):
            mine.data.copy_(theirs.data)
        through_a_file(folder, (self.optimizer, self.schedule), (other.optimizer, other.schedule))
        return other


def fault_of(name: str, folder: Path) -> str:
    """Say why an optimizer of the library cannot serve; empty if it can."""
    from pytorch_optimizer.base.exception import NoClosureError

    try:
        trial = Trial(name)
        before = trial.parameters
        start = [p.detach().clone() for p in before]
        trial.steps(0, 11)
        resumed = trial.resumed(name, folder)
        trial.steps(11, 23)
        resumed.steps(11, 23)
    except (
        SdxlTrainError,
        RuntimeError,
        ValueError,
        NoClosureError,
    ) as error:
        return str(error)
    if not torch.equal(trial.values(), resumed.values()):
        return "it goes another way after its state was restored"
    if not bool(torch.isfinite(trial.values()).all()):
        return "it is not finite"
    still = [p for p, old in zip(trial.parameters, start, strict=True) if torch.equal(p, old)]
    return f"{len(still)} tensors stay as they are" if still else ""


FAULTS = {
    "It is made of a model": r"made of '(model|optimizer)'|base_optimizer",
    "It wants to compute the loss several times": "closure",
    "It needs the graph of the gradients": "does not require grad",
    "It needs groups that are marked": "use_muon",
    "Its state holds objects": "no place in a file",
    "It exchanges gradients between processes": "process group",
    "It takes matrices only": "cannot be multiplied|only supports 2D",
    "It leaves whole tensors as they are": "tensors stay as they are",
}


def test_tables_name_every_optimizer_of_the_library_once() -> None:
    FromPytorchOptimizer.of("pytorch_optimizer.AdamW").library_class()
    found = vars(sys.modules["pytorch_optimizer"]).items()
    tables = [*FURTHER, *BY_PATH, *(name for names in LEFT_OUT.values() for name in names)]
    assert sorted([*tables, "CAME", "Lion"]) == sorted(
        name
        for name, value in found
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    )


@pytest.mark.parametrize("name", sorted((*FURTHER, *BY_PATH, "CAME", "Lion")))
def test_every_optimizer_trains_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    assert fault_of(name, tmp_path) == ""
    component: Any = FromPytorchOptimizer.of(f"pytorch_optimizer.{name}").resolved()
    needed = NEEDED.get(name, {})
    config: Any = None
    assert list(component(**needed).check(config)) == []


@pytest.mark.parametrize(("reason", "pattern"), FAULTS.items())
def test_what_is_left_out_fails_as_it_says(reason: str, pattern: str, tmp_path: Path) -> None:
    (names,) = [names for said, names in LEFT_OUT.items() if said.startswith(reason)]
    for name in names:
        assert re.search(pattern, fault_of(name, tmp_path)), name


def test_projections_without_a_rank_are_left_out_because_they_are_all_one() -> None:
    (names,) = [names for said, names in LEFT_OUT.items() if "a rank" in said]
    ends = []
    for name in names:
        trial = Trial(name, eps=1e-6)
        trial.steps(0, 5)
        ends.append(trial.values())
    assert len(ends) == 3
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_names_are_nobody_elses() -> None:
    """A name that two plugins give would be refused as soon as both are enabled."""
    own = {name.lower() for name in OPTIMIZERS}
    for entry in entry_points(group="sdxl_train"):
        if entry.name != "optimizers":
            register = getattr(entry.load(), "register_optimizers", dict)
            assert own.isdisjoint(name.lower() for name in register())


def test_importing_the_plugin_imports_no_library() -> None:
    code = (
        "import sdxl_train_optimizers, sys; print([name for name in ('torch', 'dadaptation', "
        "'pytorch_optimizer', 'schedulefree') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


class TestLion(OptimizerContract):
    component = lion.Lion
    learning_rate = 0.05


class TestCame(OptimizerContract):
    component = came.Came


class TestDAdaptAdam(OptimizerContract):
    component = d_adaptation.DAdaptAdam
    learning_rate = 1.0


class TestDAdaptAdamPreprint(OptimizerContract):
    component = d_adaptation.DAdaptAdamPreprint
    learning_rate = 1.0


class DualAveraging(OptimizerContract):
    """Weights follow the sum of all steps, at whatever rate the present one is."""

    learning_rate = 1.0
    num_steps = 700

    def test_rates_can_change_at_every_step(self) -> None:
        pytest.skip("the way to the sum goes on at a rate of 0")


class TestDAdaptAdaGrad(DualAveraging):
    component = d_adaptation.DAdaptAdaGrad


class TestDAdaptAdan(DualAveraging):
    component = d_adaptation.DAdaptAdan
    options = {"weight_decay": 0.0}


class TestDAdaptAdanIP(DualAveraging):
    component = d_adaptation.DAdaptAdanIP
    options = {"weight_decay": 0.0}


class TestDAdaptLion(OptimizerContract):
    component = d_adaptation.DAdaptLion
    learning_rate = 1.0


class TestDAdaptSGD(OptimizerContract):
    component = d_adaptation.DAdaptSGD
    learning_rate = 1.0

    def test_group_rates_are_honoured(self) -> None:
        pytest.skip("it divides by the rate")

    def test_rates_can_change_at_every_step(self) -> None:
        pytest.skip("it divides by the rate")

    def test_a_warmup_which_begins_at_zero_is_refused(self) -> None:
        made = self.make()
        config = self.run_config(made)
        assert not list(made.check(config))
        warm = replace(config, scheduler=ConstantWithWarmup(lr_warmup_steps=3))
        (problem,) = made.check(warm)
        assert "DAdaptSGD" in problem.message


class TestAdamWScheduleFree(OptimizerContract):
    component = schedule_free.AdamWScheduleFree


class TestRAdamScheduleFree(OptimizerContract):
    component = schedule_free.RAdamScheduleFree
    num_steps = 300


class TestSGDScheduleFree(OptimizerContract):
    component = schedule_free.SGDScheduleFree
