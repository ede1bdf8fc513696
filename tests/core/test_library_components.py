"""Optimizers and schedules of any library, by dotted path and typed by their signatures."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import pytest
import torch

from sdxl_train import LibraryOptimizer, LibraryScheduler, StepPlan, UserError
from sdxl_train.errors import PluginError
from sdxl_train.plugins import PluginHost
from sdxl_train.registry import KIND_BY_NAME, Registry


def test_options_are_those_of_the_signature() -> None:
    component: Any = LibraryOptimizer.of("torch.optim.Rprop").resolved()
    own = component.model_fields.keys() - LibraryOptimizer.model_fields.keys()
    assert {"etas", "step_sizes"} <= own
    assert own.isdisjoint({"params", "lr"})
    parameter = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [parameter], "lr": 1e-3, "name": "unet"}]
    built = component(learning_rate=1e-2, etas=(0.4, 1.3)).build(groups)
    assert isinstance(built, torch.optim.Rprop)
    assert built.param_groups[0]["etas"] == (0.4, 1.3)
    assert built.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("torch.optim.LBFGS", "its step needs 'closure'"),
        ("torch.nn.Linear", "no subclass of torch.optim.Optimizer"),
        ("no_such_library.Lion", "pip install no-such-library"),
    ],
)
def test_what_a_run_cannot_drive_is_refused(path: str, reason: str) -> None:
    with pytest.raises(PluginError, match=reason):
        LibraryOptimizer.of(path).resolved()


def test_refused_arguments_are_the_users_mistake() -> None:
    component: Any = LibraryOptimizer.of("torch.optim.Adamax").resolved()
    with pytest.raises(UserError, match="--optimizer_args"):
        component(betas=(2.0, 0.9)).build([{"params": [torch.nn.Parameter(torch.ones(1))]}])


def test_schedules_are_handed_the_length_of_the_run() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    cosine: Any = LibraryScheduler.of("torch.optim.lr_scheduler.CosineAnnealingLR").resolved()
    assert cosine().build(optimizer, StepPlan(total=7)).T_max == 7
    assert cosine(T_max=3).build(optimizer, StepPlan(total=7)).T_max == 3


def test_schedules_that_need_more_than_a_step_are_refused() -> None:
    with pytest.raises(PluginError, match="its step needs 'metrics'"):
        LibraryScheduler.of("torch.optim.lr_scheduler.ReduceLROnPlateau").resolved()


def test_options_that_only_the_constructor_refuses_are_told_by_the_check() -> None:
    component: Any = LibraryOptimizer.of("torch.optim.Adamax").resolved()
    config: Any = None
    assert list(component().check(config)) == []
    (problem,) = component(betas=(2.0, 0.9)).check(config)
    assert "Invalid beta parameter" in problem.message


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("pytorch_optimizer.AliG", "requires closure"),
        ("pytorch_optimizer.AdaHessian", "does not require grad"),
        ("pytorch_optimizer.AdaShift", "no place in a file"),
    ],
)
def test_optimizers_that_fail_in_a_step_are_told_by_the_check(path: str, reason: str) -> None:
    component: Any = LibraryOptimizer.of(path).resolved()
    config: Any = None
    (problem,) = component().check(config)
    assert reason in problem.message


@pytest.mark.parametrize(
    ("kind", "name", "distribution"),
    [
        ("optimizer", "AdamW8bit", "sdxl-train-bitsandbytes"),
        ("optimizer", "pagedadamw", "sdxl-train-bitsandbytes"),
        ("optimizer", "Prodigy", "sdxl-train-prodigy"),
        ("optimizer", "DAdaptAdam", "sdxl-train-optimizers"),
        ("optimizer", "RAdamScheduleFree", "sdxl-train-optimizers"),
        ("network", "loha", "sdxl-train-lycoris"),
    ],
)
def test_who_brings_a_well_known_name_is_told(
    kind: str, name: str, distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the plugin, the message names it; with it, the name is found."""
    found = {entry.name for entry in entry_points(group="sdxl_train")}
    assert distribution.removeprefix("sdxl-train-") in found
    host = PluginHost()
    monkeypatch.setattr(host, "load_rest", list)
    with pytest.raises(PluginError, match=f"pip install {distribution}"):
        Registry(host).find(KIND_BY_NAME[kind], name)


def test_missing_library_of_a_plugin_is_told_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.util

    host = PluginHost()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in {
        "AdamW8bit": "bitsandbytes",
        "Prodigy": "prodigyopt",
        "Lion": "pytorch-optimizer",
        "SOAP": "pytorch-optimizer",
        "DAdaptation": "dadaptation",
        "AdamWScheduleFree": "schedulefree",
    }.items():
        with pytest.raises(PluginError, match=f"pip install {package}"):
            Registry(host).find(KIND_BY_NAME["optimizer"], name)
