"""One run, in order: build, cache, train, save, tell.

With several processes, all of them do all of that, but only the main one writes files and tells
observers.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdxl_train.accelerator import make_accelerator
from sdxl_train.blame import blame
from sdxl_train.built import build
from sdxl_train.change import ChangeCheck
from sdxl_train.checkpoint import write_atomically
from sdxl_train.counts import SavePoint, with_state
from sdxl_train.document import earlier_notes, write_document
from sdxl_train.earlier import clear_the_way, sole_writer
from sdxl_train.errors import TrainingError, UserError
from sdxl_train.held_out import HeldOut
from sdxl_train.history import History
from sdxl_train.loop import StepResult, train
from sdxl_train.observed import Run, RunResult
from sdxl_train.observers import Kept, Observers
from sdxl_train.pace import Pace
from sdxl_train.process_group import join
from sdxl_train.record import make_record
from sdxl_train.resume import model_identity
from sdxl_train.run_document import RunDocument
from sdxl_train.saver import Saver
from sdxl_train.signals import RunSignals
from sdxl_train.state import load_observers, well_formed
from sdxl_train.state_transfer import within_reach
from sdxl_train.supply import Supply
from sdxl_train.validation import ValidationResult, best_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from accelerate import Accelerator

    from sdxl_train.planning import Plan
    from sdxl_train.preflight import Prepared
    from sdxl_train.ranks import Ranks
    from sdxl_train.record import RunRecord
    from sdxl_train.resume import ResumePoint
    from sdxl_train.spread import SpreadModule

logger = logging.getLogger(__name__)


def execute(
    prepared: Prepared, plan: Plan, *, lap: Callable[[str], None] | None = None
) -> RunResult:
    """Run what was prepared and planned.

    Args:
        prepared: The run.
        plan: Its plan.
        lap: Told of each phase of a step as it ends; see :func:`sdxl_train.train`.

    Raises:
        UserError: If the machine cannot do what the options ask.
        TrainingError: If training fails; the files written before are whole.
    """
    plugins = list(prepared.host.enabled.values())
    try:
        ranks = join(prepared.config.processes)
        accelerator = make_accelerator(prepared.config)
        with ranks.together():
            return _execute(_as_in_main(prepared, ranks), plan, accelerator, ranks, lap or _ignored)
    except BaseException as error:
        blame(error, plugins)
        raise


def _ignored(phase: str) -> None:
    """Do nothing at the end of a phase."""


def _execute(
    prepared: Prepared,
    plan: Plan,
    accelerator: Accelerator,
    ranks: Ranks,
    lap: Callable[[str], None],
) -> RunResult:
    if prepared.resume is not None and prepared.start >= prepared.counts.total:
        logger.info(
            "already complete: %d of %d steps are done in %s",
            prepared.start,
            prepared.counts.total,
            prepared.resume.folder,
        )
        return RunResult(steps=prepared.start)
    with sole_writer(prepared.config) if ranks.main else nullcontext():
        trainer = Trainer(prepared, plan, accelerator, ranks, lap)
        # Until all is written: a launcher signals every process when one of them fails.
        with RunSignals(patience=ranks.patience) as signals:
            ranks.listen(signals)
            trainer.run_to_end()
    return trainer.result


def _as_in_main(prepared: Prepared, ranks: Ranks) -> Prepared:
    """Take from the main process what each would find out for itself: the seed, where to go on."""
    seed, start, resume = ranks.from_main((prepared.seed, prepared.start, prepared.resume))
    batches = prepared.batches.with_seed(seed)
    return replace(prepared, seed=seed, batches=batches, start=start, resume=resume)


class Trainer:
    """Trains what was built, saves what falls due, and tells the observers."""

    def __init__(
        self,
        prepared: Prepared,
        plan: Plan,
        accelerator: Accelerator,
        ranks: Ranks,
        lap: Callable[[str], None],
    ) -> None:
        self.prepared = prepared
        self.config = prepared.config
        self.ranks = ranks
        self.lap = lap
        self.pace = Pace()
        self.result = RunResult()
        self.built = build(prepared, accelerator, ranks, lap)
        record = make_record(prepared, self.built, main=ranks.main)
        if ranks.main:
            self.config.output.output_dir.mkdir(parents=True, exist_ok=True)
            clear_the_way(self.config)
        self.run = self._run(plan)
        self.facts = RunDocument(prepared, plan, record, self.result, accelerator.device)
        self.saver = Saver(
            prepared,
            self.built,
            record,
            watched=self._watched,
            average=lambda step: self.observers.average_after(step),
        )
        kept = self._restore(prepared.resume, record) if prepared.resume is not None else None
        ranks.require_same(self.built.facts(prepared) if ranks.count > 1 else {})
        self.result.steps = prepared.start
        self.built.update.begin(
            lambda index: self.built.step.streams.on_device("rounding", self.result.steps, index)
        )
        self.change = ChangeCheck(
            self.built.assembly.parameters, silent_steps=self.config.optimizer.silent_steps()
        )
        self.observers = Observers(prepared, ranks, self.run, kept)
        if kept is not None:
            self.observers.events.restore(kept.observers)
        self.supply = Supply(
            prepared,
            self.built.model,
            accelerator.device,
            accelerator.autocast,
            trains_text=self.built.trains_text,
            ranks=ranks,
        )
        self.supply.fill_caches()
        self.held_out = HeldOut(prepared, self.built, self.supply, ranks, self.result)
        self.spread = self._spread()

    def run_to_end(self) -> None:
        """Train, and close whatever happens."""
        error: BaseException | None = None
        try:
            with self.facts.remarks:
                self._write_record()
                self.train()
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.close(error)

    def train(self) -> None:
        """Train to the end, or to the first signal, saving what falls due."""
        self._tell("run_started")
        total = self.prepared.counts.total
        last: StepResult | None = None
        self._validate_what_was_resumed()
        batches = self.supply.steps(self.result.steps)
        if self.spread is not None:
            batches = self.spread.enter(batches)
        steps = train(batches, self.built.step, start=self.result.steps)
        while not self.held_out.is_out_of_patience():
            began = time.monotonic()
            try:
                step = next(steps, None)
            except Exception as error:
                self._rescue(last, error)
                raise
            if step is None:
                break
            last = step
            self.result.steps = last.step
            self.change.after(last)
            self.run.history.add(last, time.monotonic() - began)
            self.result.skipped_steps = self.run.history.skipped
            self.lap("logging")
            signalled, asked_to_save = self.ranks.heard()
            stopped = signalled is not None and last.step < total
            points = self.prepared.saves.due(last.step)
            if stopped or asked_to_save:
                points = with_state(points, last.step)
            # A state holds what its observers knew after the step; the others can wait for it.
            self._tell("step_finished", keepers=True, step=last)
            self.lap("hooks")
            self._save(points, last)
            self.lap("saving")
            self._tell("step_finished", keepers=False, step=last)
            self.lap("hooks")
            if self.pace.is_due():
                self._write_record()
            self.lap("logging")
            if signalled is not None and stopped:
                self.result.exit_code = 128 + signalled  # as shells count
                break
            self._validate(last.step, last.epoch)
        if self.result.stopped_early and last is not None:
            state = self.prepared.saves.state_at_end
            self._save([SavePoint(kind="final", number=last.step, state=state)], last)
        self.change.conclude()
        self.result.final_loss = last.loss.item() if last else None

    def _tell(self, event: str, **arguments: Any) -> None:
        self.observers.events.tell(event, run=self.run, **arguments)

    def _save(self, points: Sequence[SavePoint], step: StepResult) -> None:
        if any(point.state for point in points):
            self.built.update.collect()
        for point in points if self.ranks.main else ():
            self._save_point(point, step.step, step.epoch)

    def _save_point(self, point: SavePoint, step: int, epoch: int) -> None:
        checkpoint = self.saver.save(point, step, epoch)
        if checkpoint is not None:
            self._tell("checkpoint_saved", checkpoint=checkpoint)

    def _validate(self, step: int, epoch: int) -> None:
        """Measure the loss on held-out images, if there are any and it is time."""
        result = self.held_out.measure(step, epoch)
        if result is None:
            return
        is_best = best_of(self.result.validations) is result
        if self.ranks.main and self.config.output.save_best and is_best:
            self._save_point(SavePoint(kind="best", number=step), step, epoch)
        self._tell("validation_finished", result=result)

    def _validate_what_was_resumed(self) -> None:
        """Validate the step of the state, which was saved before that was done."""
        step, results = self.result.steps, self.result.validations
        if self.prepared.resume is not None and not (results and results[-1].step == step):
            self._validate(step, -(-step // self.prepared.counts.steps_per_epoch))

    def _rescue(self, last: StepResult | None, error: Exception) -> None:
        """Save the weights and the state of the last whole step, before ``error`` ends the run."""
        if last is None or self.built.step.updating or self.saver.state_at == last.step:
            return
        if not self.ranks.main:
            return
        try:
            network, state = self.saver.network_at != last.step, self.built.update.whole
            point = SavePoint(kind="step", number=last.step, network=network, state=state)
            self._save([point], last)
        except TrainingError as second:
            error.add_note(f"the state of step {last.step} could not be saved either: {second}")
        else:
            fate = "is saved: --resume latest goes on there"
            if not state:
                fate = (
                    "is lost, of which each process had a part; the network of that step is saved"
                )
            error.add_note(f"the state of step {last.step} {fate}")

    def close(self, error: BaseException | None) -> None:
        """End the workers, tell the observers, and write the record."""
        events = self.observers.events
        self.supply.close()
        self.result.files = self.saver.files
        self.facts.status = _status(error, self.result)
        self.run.history.read()
        self._tell("run_finished", error=error)
        events.close()
        self.result.observer_failures = dict(events.failures)
        self._write_record()

    def document(self) -> dict[str, Any]:
        """Give all that is known of the run now, as plain JSON values."""
        failures = self.observers.events.failures
        return self.facts.content(self.run, self.saver.files, failures)

    def _write_record(self) -> None:
        if not self.ranks.main:
            return
        path = self.run.output_dir / f"{self.run.name}.run.json"
        with self.pace.at_work():
            write_atomically(path, write_document(self.document()))

    def _restore(self, point: ResumePoint, record: RunRecord) -> Kept:
        """Put back what the run knew, and give what its observers kept."""
        model = model_identity(record.described)
        same = model == point.manifest.model or self.config.training.allow_base_change
        if self.ranks.main and not same:
            raise UserError.of(
                self.config.place("pretrained_model_name_or_path"),
                f"is {model} now, {point.manifest.model} in {point.folder}",
                "resume with the base model of the state, or add --allow_base_change",
            )
        with within_reach(point.folder, self.ranks) as folder:
            return self._restore_from(replace(point, folder=folder))

    def _restore_from(self, point: ResumePoint) -> Kept:
        self.saver.restore(point)
        if self.config.training.reset_optimizer:
            return Kept()  # the weights only: the rest may be what is corrupt
        watched = load_observers(point.folder)
        with well_formed(point.folder):
            self.run.history.load_state_dict(watched["history"])
            results = watched["validations"]["results"]
            self.result.validations = [ValidationResult.from_json(result) for result in results]
            return Kept(averages=watched["averages"], observers=watched["observers"])

    def _watched(self) -> dict[str, dict[str, Any]]:
        """Give what a state keeps of what was seen so far."""
        results = [result.as_json() for result in self.result.validations]
        return {
            "history": self.run.history.state_dict(),
            "validations": {"results": results},
            **self.observers.states(self.result.steps),
        }

    def _spread(self) -> SpreadModule | None:
        """Leave each process a part of the frozen weights, if that is asked for."""
        options, built = self.config.processes, self.built
        if not options.spreads_base or self.ranks.count == 1:
            return None
        from sdxl_train.spread import SpreadModule

        built.evaluation.spread = SpreadModule(
            built.model.denoiser,
            self.ranks,
            built.accelerator.device,
            offload=options.offload_param_device == "cpu",
        )
        return built.evaluation.spread

    @contextmanager
    def _evaluation_of_observer(self) -> Iterator[None]:
        if self.built.evaluation.spread is not None and not self.ranks.attempting:
            raise TrainingError(
                "with --fsdp only observers that act everywhere can use the model: each process "
                "has a part of it"
            )
        with self.built.evaluation.pause():
            yield

    def _run(self, plan: Plan) -> Run:
        """Give the run as observers see it."""
        prepared, output = self.prepared, self.config.output
        return Run(
            config=self.config,
            plan=plan,
            assembly=self.built.assembly,
            output_dir=output.output_dir,
            name=output.output_name or "last",
            seed=prepared.seed,
            counts=prepared.counts,
            first_step=prepared.start,
            resolution=prepared.scan.largest_resolution,
            history=History(
                (image.key for data in prepared.scan.datasets for image in data.images),
                num_timesteps=self.built.model.schedule.num_timesteps,
                steps_per_epoch=prepared.counts.steps_per_epoch,
            ),
            notes=earlier_notes(prepared.resume.record_path) if prepared.resume else {},
            earlier_folder=prepared.resume.folder.parent if prepared.resume else None,
            document=self.document,
            tell=lambda event, **arguments: self.observers.events.tell(event, **arguments),
            evaluation=self._evaluation_of_observer,
            stopping=self.ranks.stopping,
            main=self.ranks.main,
            share_out=self.ranks.share_out,
        )


def _status(error: BaseException | None, result: RunResult) -> str:
    if error is not None:
        return f"failed: {type(error).__name__}: {error}"
    if result.exit_code:
        return "interrupted"
    return "stopped early" if result.stopped_early else "complete"
