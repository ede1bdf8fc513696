"""The contract of observers, told the events of a real run in every order."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pluggy
import pytest
import torch

from sdxl_train import hookspecs
from sdxl_train.components import Observer
from sdxl_train.events import Events
from sdxl_train.hookspecs import EVENTS
from sdxl_train.pictures import ImageRequest, SampledImage
from sdxl_train.testing.contract import Contract, untouched_process

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from sdxl_train.observed import Run
    from sdxl_train.testing.fixtures import TrainTiny

Told = tuple[str, dict[str, Any]]
_SHUFFLES = 8


class ObserverContract(Contract[Observer]):
    """Hears events of its run, in any order and number, and leaves everything as it is."""

    @pytest.fixture(scope="class")
    @classmethod
    def told(cls, train_tiny: TrainTiny) -> list[Told]:
        """What a short real run tells, in its order."""
        told: list[Told] = []

        def run_started(run: Run) -> None:
            told.append(("run_started", {"run": run}))

        def step_finished(run: Run, step: object) -> None:
            told.append(("step_finished", {"run": run, "step": step}))

        def checkpoint_saved(run: Run, checkpoint: object) -> None:
            told.append(("checkpoint_saved", {"run": run, "checkpoint": checkpoint}))

        def validation_finished(run: Run, result: object) -> None:
            told.append(("validation_finished", {"run": run, "result": result}))

        heard = (run_started, step_finished, checkpoint_saved, validation_finished)
        train_tiny(
            events={function.__name__: function for function in heard},
            validation_split=0.25,
            validate_every_n_steps=2,
            save_every_n_steps=2,
        )
        run = told[0][1]["run"]
        images = [_picture(run.output_dir), _picture(None)]
        told.append(("images_sampled", {"run": run, "images": images}))
        told.append(("run_finished", {"run": run, "error": None}))
        assert {event for event, _ in told} == set(EVENTS)
        return told

    def tell(self, told: Iterable[Told], run: Run) -> None:
        """Build the observer for the run and tell it of these events."""
        events = Events(_manager(), [], strict=True)
        events.add_observer(self.component.__name__, self.make().build(run))
        try:
            for event, arguments in told:
                events.tell(event, **arguments)
        finally:
            events.close()
        # A run that failed ends with its own error, so that of the observer is only noted.
        assert not events.failures, f"it fails: {events.failures}"

    def test_it_hears_events(self, told: list[Told]) -> None:
        """What it builds has methods named after events, with arguments that these have."""
        self.tell([], _run(told))

    def test_events_of_a_run_pass(self, told: list[Told]) -> None:
        """It takes what a run tells, in its order, twice in a row with an object each."""
        for _ in range(2):
            self.tell(told, _run(told))

    @pytest.mark.parametrize("event", EVENTS)
    def test_each_event_passes_alone_and_twice(self, told: list[Told], event: str) -> None:
        """It relies on no event before: a run may fail at its first step."""
        named = [(name, arguments) for name, arguments in told if name == event]
        self.tell([named[0], named[-1]], _run(told))

    @pytest.mark.parametrize("seed", range(_SHUFFLES))
    def test_events_pass_in_any_order(self, told: list[Told], seed: int) -> None:
        """It relies on no order of events."""
        shuffled = random.Random(seed).sample(told, len(told))
        self.tell(shuffled, _run(told))

    def test_failed_run_is_borne(self, told: list[Told]) -> None:
        """The end of a run that failed passes like any other."""
        run = _run(told)
        self.tell([told[0], ("run_finished", {"run": run, "error": RuntimeError("boom")})], run)

    def test_weights_and_process_are_left_alone(self, told: list[Told]) -> None:
        """Neither the network nor what all of the process shares is another afterwards."""
        run = _run(told)
        before = {name: t.clone() for name, t in run.assembly.adapter.state_dict().items()}
        with untouched_process():
            self.tell(told, run)
        after = run.assembly.adapter.state_dict()
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert not changed, f"it changes the network: {', '.join(changed[:3])}"

    def test_planned_samples_are_steps_of_the_run(self, told: list[Told]) -> None:
        """The plan can say when it samples."""
        counts = _run(told).counts
        steps = self.make().sample_steps(counts)
        assert all(isinstance(step, int) and 0 <= step <= counts.total for step in steps), steps


def _run(told: list[Told]) -> Run:
    run: Run = told[0][1]["run"]
    return run


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def _picture(folder: Path | None) -> SampledImage:
    """Give a picture in ``folder``; without one, a picture that could not be taken."""
    from PIL import Image

    request = ImageRequest(
        prompt="a cat, <b>&",
        width=64,
        height=64,
        steps=2,
        guidance_scale=7.5,
        seed=1,
        sampler="ddim",
    )
    path = None
    if folder is not None:
        path = folder / "contract.png"
        Image.new("RGB", (64, 64), "teal").save(path)
    fault = None if path else "every pixel is not a number"
    return SampledImage(request=request, index=0, step=2, epoch=1, path=path, fault=fault)
