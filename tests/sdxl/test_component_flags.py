"""Options that components declare as flags: who has them, what is recorded, what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sdxl_train.cli.help import training_help
from sdxl_train.plugins import PluginHost
from sdxl_train.registry import Registry
from sdxl_train.resolve import Resolver
from sdxl_train.settings import from_words

if TYPE_CHECKING:
    from sdxl_train.resolve import Resolution


def resolve(line: str) -> Resolution:
    words = "--pretrained_model_name_or_path base.safetensors --output_dir out " + line
    settings, _ = from_words(words.split(), [])
    host = PluginHost()
    return Resolver(settings, host, Registry(host)).resolve()


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        (
            "--lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 3",
            "lr_scheduler_num_cycles",
            3,
        ),
        ("--lr_scheduler polynomial --lr_scheduler_power 2", "lr_scheduler_power", 2.0),
        ("--lr_scheduler inverse_sqrt --lr_scheduler_timescale 50", "lr_scheduler_timescale", 50),
        ("--lr_scheduler warmup_stable_decay --lr_decay_steps 20%", "lr_decay_steps", 0.2),
        ("--loss_type huber --huber_scale 2", "huber_scale", 2.0),
    ],
)
def test_flags_reach_their_component_and_the_record(line: str, name: str, value: object) -> None:
    resolution = resolve(line)
    assert resolution.problems == []
    assert resolution.config is not None
    assert resolution.config.options()[name] == {"value": value, "origin": "command line"}


def test_args_of_a_schedule_stay_args() -> None:
    resolution = resolve(
        "--lr_scheduler piecewise_constant --lr_scheduler_args step_rules=1:10,0.1"
    )
    assert resolution.problems == []
    assert resolution.config is not None
    recorded = resolution.config.options()["lr_scheduler_args.step_rules"]
    assert recorded == {"value": "1:10,0.1", "origin": "command line"}


@pytest.mark.parametrize(
    ("line", "place", "names"),
    [
        ("--lr_scheduler cosine --lr_scheduler_power 2", "--lr_scheduler_power", ["polynomial"]),
        (
            "--lr_scheduler_num_cycles 2",
            "--lr_scheduler_num_cycles",
            ["cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"],
        ),
        ("--lr_decay_steps 20", "--lr_decay_steps", ["warmup_stable_decay"]),
        ("--huber_c 0.1", "--huber_c", ["huber", "smooth_l1"]),
    ],
)
def test_flags_without_their_component_are_refused(line: str, place: str, names: list[str]) -> None:
    (problem,) = resolve(line).problems
    assert problem.place == place
    assert all(name in problem.message for name in names)


def test_flags_of_a_schedule_are_not_among_its_args() -> None:
    line = "--lr_scheduler polynomial --lr_scheduler_args lr_scheduler_power=2"
    (problem,) = resolve(line).problems
    assert "--lr_scheduler_power" in problem.remedy


def test_help_shows_the_flags_of_schedules_and_their_args() -> None:
    host = PluginHost()
    host.apply([], [])
    lines = training_help(Registry(host), {})
    assert "  --lr_scheduler_power " in lines
    assert "--lr_scheduler_args step_rules=" in lines
