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
from sdxl_train.assembly import assemble, build_optimizer
from sdxl_train.blame import blame
from sdxl_train.change import ChangeCheck
from sdxl_train.checkpoint import write_atomically
from sdxl_train.counts import SavePoint, with_state
from sdxl_train.data.metadata import dataset_metadata
from sdxl_train.document import (
    earlier_notes,
    machine,
    peak_memory,
    speed,
    with_paths,
    write_document,
)
from sdxl_train.earlier import clear_the_way, sole_writer
from sdxl_train.errors import TrainingError, UserError
from sdxl_train.evaluation import Evaluation
from sdxl_train.events import Events
from sdxl_train.history import History
from sdxl_train.loop import StepResult, train
from sdxl_train.observed import Run, RunResult
from sdxl_train.pace import Pace
from sdxl_train.process_group import digest, join
from sdxl_train.protocols import WeightAverage
from sdxl_train.record import RunRecord, describe_optimizer
from sdxl_train.remarks import Remarks
from sdxl_train.resume import dataset_digest, model_identity, shaping_options
from sdxl_train.rng import derive_seed
from sdxl_train.saver import Saver
from sdxl_train.signals import RunSignals
from sdxl_train.state import load_observers, well_formed
from sdxl_train.state_transfer import within_reach
from sdxl_train.step_building import build_step
from sdxl_train.supply import Supply
from sdxl_train.update import make_update
from sdxl_train.validation import (
    Validation,
    ValidationResult,
    best_of,
    patience_is_over,
    validation_due,
    validation_timesteps,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from accelerate import Accelerator
    from torch import Tensor

    from sdxl_train.checkpoint import Checkpoint
    from sdxl_train.planning import Plan
    from sdxl_train.preflight import Prepared
    from sdxl_train.ranks import Ranks
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
    """Holds what a run builds, from the model to the observers."""

    def __init__(
        self,
        prepared: Prepared,
        plan: Plan,
        accelerator: Accelerator,
        ranks: Ranks,
        lap: Callable[[str], None],
    ) -> None:
        config = prepared.config
        self.lap = lap
        self.prepared = prepared
        self.config = config
        self.accelerator = accelerator
        self.ranks = ranks
        device = accelerator.device
        logger.info("device %s, mixed precision %s", device, config.training.mixed_precision)
        self.assembly = assemble(config, device, prepared.seed)
        self.model = self.assembly.model
        self.trains_text = any(p.module is not self.model.denoiser for p in self.model.parts)
        optimizer = build_optimizer(config, self.assembly.groups)
        if config.optimizer.train_eval_modes:
            optimizer.train()  # type: ignore[attr-defined]
        self.evaluation = Evaluation(
            self.assembly,
            optimizer,
            swaps_weights=config.optimizer.train_eval_modes,
            autocast=self.accelerator.autocast,
        )
        self.scheduler = config.build_schedule(optimizer, prepared.counts.step_plan)
        self.update = make_update(config, accelerator, ranks, optimizer, self.assembly.parameters)
        self.step = build_step(
            config, self.assembly, self.update, self.scheduler, seed=prepared.seed, lap=lap
        )
        self.result = RunResult()
        self.status = "running"
        self.remarks = Remarks()
        self.pace = Pace()
        self.record = self._build_record()
        output = config.output
        if ranks.main:
            output.output_dir.mkdir(parents=True, exist_ok=True)
            clear_the_way(config)
        self.history = self._build_history()
        self.run = Run(
            config=config,
            plan=plan,
            assembly=self.assembly,
            output_dir=output.output_dir,
            name=output.output_name or "last",
            seed=prepared.seed,
            counts=prepared.counts,
            first_step=prepared.start,
            resolution=self._largest_resolution(),
            history=self.history,
            notes=earlier_notes(prepared.resume.record_path) if prepared.resume else {},
            earlier_folder=prepared.resume.folder.parent if prepared.resume else None,
            document=self.document,
            tell=lambda event, **arguments: self.events.tell(event, **arguments),
            evaluation=self._evaluation_of_observer,
            stopping=ranks.stopping,
            main=ranks.main,
            share_out=ranks.share_out,
        )
        self.saver = Saver(
            prepared,
            self.assembly,
            self.record,
            self.evaluation,
            update=self.update,
            scheduler=self.scheduler,
            scaler=self.accelerator.scaler,
            watched=self._watched,
            average=self._average_after,
        )
        self.averages: dict[str, WeightAverage] = {}
        self._restored_averages: Mapping[str, Mapping[str, Any]] = {}
        kept = self._restore(prepared.resume) if prepared.resume is not None else {}
        ranks.require_same(self._facts())
        self.result.steps = prepared.start
        self.update.begin(
            lambda index: self.step.streams.on_device("rounding", self.result.steps, index)
        )
        self.change = ChangeCheck(
            self.assembly.parameters, silent_steps=config.optimizer.silent_steps()
        )
        self.events = self._build_events()
        self.events.restore(kept)
        self.supply = Supply(
            prepared,
            self.model,
            device,
            self.accelerator.autocast,
            trains_text=self.trains_text,
            ranks=ranks,
        )
        self.supply.fill_caches()
        self.validation = self._build_validation()
        self.spread = self._spread()

    def run_to_end(self) -> None:
        """Train, and close whatever happens."""
        error: BaseException | None = None
        try:
            with self.remarks:
                self._write_record()
                self.train()
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.close(error)

    def train(self) -> None:
        """Train to the end, or to the first signal, saving what falls due."""
        self.events.tell("run_started", run=self.run)
        total = self.prepared.counts.total
        last: StepResult | None = None
        self._validate_what_was_resumed()
        batches = self.supply.steps(self.result.steps)
        if self.spread is not None:
            batches = self.spread.enter(batches)
        steps = train(batches, self.step, start=self.result.steps)
        while not self._is_out_of_patience():
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
            self.history.add(last, time.monotonic() - began)
            self.result.skipped_steps = self.history.skipped
            self.lap("logging")
            signalled, asked_to_save = self.ranks.heard()
            stopped = signalled is not None and last.step < total
            points = self.prepared.saves.due(last.step)
            if stopped or asked_to_save:
                points = with_state(points, last.step)
            # A state holds what its observers knew after the step; the others can wait for it.
            self.events.tell("step_finished", keepers=True, run=self.run, step=last)
            self.lap("hooks")
            self._save(points, last)
            self.lap("saving")
            self.events.tell("step_finished", keepers=False, run=self.run, step=last)
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

    def _save(self, points: Sequence[SavePoint], step: StepResult) -> None:
        if any(point.state for point in points):
            self.update.collect()
        for point in points if self.ranks.main else ():
            self._tell_saved(self.saver.save(point, step.step, step.epoch))

    def _tell_saved(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            self.events.tell("checkpoint_saved", run=self.run, checkpoint=checkpoint)

    def _validate(self, step: int, epoch: int) -> None:
        """Measure the loss on held-out images, if there are any and it is time."""
        due = validation_due(self.config, self.prepared.counts, step)
        if self.validation is None or not due:
            return
        measured = None
        with self.evaluation.pause():
            if self.ranks.main:
                measured = self.validation.after(step, epoch, due)
        # The others stop with it, when the loss has not fallen for long.
        result = self.ranks.from_main(measured)
        assert result is not None
        results = self.result.validations
        results.append(result)
        if self.ranks.main and self.config.output.save_best and best_of(results) is result:
            best = SavePoint(kind="best", number=step)
            self._tell_saved(self.saver.save(best, step, epoch))
        self.events.tell("validation_finished", run=self.run, result=result)

    def _validate_what_was_resumed(self) -> None:
        """Validate the step of the state, which was saved before that was done."""
        step, results = self.result.steps, self.result.validations
        if self.prepared.resume is not None and not (results and results[-1].step == step):
            self._validate(step, -(-step // self.prepared.counts.steps_per_epoch))

    def _is_out_of_patience(self) -> bool:
        """Tell whether to stop because the loss on held-out images has not fallen for long."""
        results, patience = self.result.validations, self.config.training.early_stop_patience
        early = self.result.steps < self.prepared.counts.total
        if early and patience_is_over(results, patience) and not self.result.stopped_early:
            self.result.stopped_early = True
            best = best_of(results)
            logger.info(
                "stopped early after step %d: %d times in a row the loss on held-out images was "
                "no lower than %s",
                self.result.steps,
                patience,
                f"{best.loss:.4f} after step {best.step}" if best else "any",
            )
        return self.result.stopped_early

    def _rescue(self, last: StepResult | None, error: Exception) -> None:
        """Save the weights and the state of the last whole step, before ``error`` ends the run."""
        if last is None or self.step.updating or self.saver.state_at == last.step:
            return
        if not self.ranks.main:
            return
        try:
            network, state = self.saver.network_at != last.step, self.update.whole
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
        self.supply.close()
        self.result.files = self.saver.files
        self.status = _status(error, self.result)
        self.history.read()
        self.events.tell("run_finished", run=self.run, error=error)
        self.events.close()
        self.result.observer_failures = dict(self.events.failures)
        self._write_record()

    def document(self) -> dict[str, Any]:
        """Give all that is known of the run now, as plain JSON values."""
        self.history.read()
        plan = self.run.plan.as_json()
        told = ("dataset", "saves", "samples", "validations", "modules", "groups", "memory")
        images = [image for dataset in self.prepared.scan.datasets for image in dataset.images]
        return {
            **self.record.facts(),
            "name": self.run.name,
            "machine": machine(self.accelerator.device),
            "plan": {name: plan[name] for name in told},
            "warnings": list(dict.fromkeys([*plan["warnings"], *self.remarks.texts])),
            "history": self.history.as_json(),
            "loss_by_timestep": self.history.loss_by_timestep(),
            "loss_by_image": with_paths(
                self.history.loss_by_image(), {image.key: image.path for image in images}
            ),
            "speed": speed(self.history),
            "memory": peak_memory(self.accelerator.device),
            "notes": self.run.notes,
            "results": {
                "status": self.status,
                "steps": self.result.steps,
                "skipped_steps": self.result.skipped_steps,
                "final_loss": self.result.final_loss,
                "validations": [result.as_json() for result in self.result.validations],
                "files": [path.name for path in self.saver.files],
                "observer_failures": dict(self.events.failures),
                "written_at": time.time(),
            },
        }

    def _write_record(self) -> None:
        if not self.ranks.main:
            return
        with self.pace.at_work():
            write_atomically(self._record_path, write_document(self.document()))

    @property
    def _record_path(self) -> Path:
        output = self.config.output
        return output.output_dir / f"{output.output_name or 'last'}.run.json"

    def _restore(self, point: ResumePoint) -> Mapping[str, Mapping[str, Any]]:
        """Put back what the run knew, and give what its observers kept."""
        model = model_identity(self.record.described)
        same = model == point.manifest.model or self.config.training.allow_base_change
        if self.ranks.main and not same:
            raise UserError.of(
                self.config.place("pretrained_model_name_or_path"),
                f"is {model} now, {point.manifest.model} in {point.folder}",
                "resume with the base model of the state, or add --allow_base_change",
            )
        with within_reach(point.folder, self.ranks) as folder:
            return self._restore_from(replace(point, folder=folder))

    def _restore_from(self, point: ResumePoint) -> Mapping[str, Mapping[str, Any]]:
        self.saver.restore(point)
        if self.config.training.reset_optimizer:
            return {}  # the weights only: the rest may be what is corrupt
        watched = load_observers(point.folder)
        with well_formed(point.folder):
            self.history.load_state_dict(watched["history"])
            self._restored_averages = watched["averages"]
            results = watched["validations"]["results"]
            self.result.validations = [ValidationResult.from_json(result) for result in results]
            kept: Mapping[str, Mapping[str, Any]] = watched["observers"]
        return kept

    def _watched(self) -> dict[str, dict[str, Any]]:
        """Give what a state keeps of what was seen so far."""
        results = [result.as_json() for result in self.result.validations]
        averages = {
            name: dict(average.state_after(self.result.steps))
            for name, average in self.averages.items()
        }
        return {
            "history": self.history.state_dict(),
            "validations": {"results": results},
            "averages": averages,
            "observers": self.events.states(),
        }

    def _average_after(self, step: int) -> Sequence[Tensor] | None:
        """Give the average that an observer keeps of the weights, unless it has failed."""
        sound = (
            average
            for name, average in self.averages.items()
            if f"observer {name}" not in self.events.failures
        )
        average = next(sound, None)
        return average.average_after(step) if average else None

    def _build_validation(self) -> Validation | None:
        if self.prepared.validation is None:
            return None
        limit = self.config.training.max_validation_steps
        return Validation(
            step=self.step,
            batches=lambda: self.supply.validation(limit),
            seed=derive_seed(self.config.dataset.validation_seed or 0, "validation"),
            timesteps=validation_timesteps(self.config, self.model),
        )

    def _spread(self) -> SpreadModule | None:
        """Leave each process a part of the frozen weights, if that is asked for."""
        options = self.config.processes
        if not options.spreads_base or self.ranks.count == 1:
            return None
        from sdxl_train.spread import SpreadModule

        self.evaluation.spread = SpreadModule(
            self.model.denoiser,
            self.ranks,
            self.accelerator.device,
            offload=options.offload_param_device == "cpu",
        )
        return self.evaluation.spread

    @contextmanager
    def _evaluation_of_observer(self) -> Iterator[None]:
        if self.evaluation.spread is not None and not self.ranks.attempting:
            raise TrainingError(
                "with --fsdp only observers that act everywhere can use the model: each process "
                "has a part of it"
            )
        with self.evaluation.pause():
            yield

    def _build_history(self) -> History:
        datasets = self.prepared.scan.datasets
        return History(
            (image.key for dataset in datasets for image in dataset.images),
            num_timesteps=self.model.schedule.num_timesteps,
            steps_per_epoch=self.prepared.counts.steps_per_epoch,
        )

    def _build_record(self) -> RunRecord:
        prepared = self.prepared
        return RunRecord(
            config=self.config,
            counts=prepared.counts,
            seed=prepared.seed,
            session=derive_seed(time.time_ns(), "session") % 2**32,
            started=time.time(),
            optimizer=describe_optimizer(self.update.bare, self.config),
            num_timesteps=self.model.schedule.num_timesteps,
            described=self._described() if self.ranks.main else {},
        )

    def _described(self) -> dict[str, str]:
        return {
            "ss_total_batch_size": str(self._batch_size()),
            "modelspec.resolution": "{}x{}".format(*self._largest_resolution()),
            **dataset_metadata(self.prepared.scan, self.config.dataset),
            **self.model.metadata(),
            **self.assembly.adapter.metadata(),
        }

    def _facts(self) -> dict[str, str]:
        """Give what must be the same in every process, as digests."""
        if self.ranks.count == 1:
            return {}
        model = self.model
        modules = [model.denoiser, *(model.text_encoders if self.trains_text else ())]
        # Biases and norms tell two fine-tunes apart, and take no time.
        vectors = [p for module in modules for p in module.parameters() if p.ndim == 1]
        return {
            "options": repr(shaping_options(self.config)),
            "dataset": dataset_digest(self.prepared.scan),
            "base model": digest(vectors),
            "text encoders": "" if self.trains_text else repr(model.text_encoders_identity()),
            "network weights": digest(self.assembly.parameters),
        }

    def _batch_size(self) -> int:
        """Give the samples of an optimizer step, at most."""
        sizes = [dataset.config.batch_size for dataset in self.prepared.scan.datasets]
        accumulated = self.config.training.gradient_accumulation_steps
        return max(sizes) * self.prepared.processes * accumulated

    def _largest_resolution(self) -> tuple[int, int]:
        resolutions = [dataset.config.resolution for dataset in self.prepared.scan.datasets]
        return max(resolutions, key=lambda size: size[0] * size[1])

    def _build_events(self) -> Events:
        host = self.prepared.host
        events = Events(
            host.manager,
            list(host.enabled.values()),
            strict=self.config.training.strict_observers,
            timeout=self.config.training.observer_timeout,
            ranks=self.ranks,
        )
        names = [e.qualified for e in self.config.entries if e.kind.name == "observer"]
        for name, observer in zip(names, self.config.observers, strict=True):
            if not (self.ranks.main or observer.everywhere):
                continue
            built = observer.build(self.run)
            events.add_observer(
                name, built, unlimited=observer.unlimited, everywhere=observer.everywhere
            )
            if isinstance(built, WeightAverage):
                self.averages[name] = built
                if self.prepared.resume is not None:
                    built.restore(self._restored_averages.get(name))
        return events


def _status(error: BaseException | None, result: RunResult) -> str:
    if error is not None:
        return f"failed: {type(error).__name__}: {error}"
    if result.exit_code:
        return "interrupted"
    return "stopped early" if result.stopped_early else "complete"
