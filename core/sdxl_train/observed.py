"""A run as observers and callers see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from sdxl_train.assembly import Assembly
    from sdxl_train.config import RunConfig
    from sdxl_train.counts import StepCounts
    from sdxl_train.history import History
    from sdxl_train.planning import Plan
    from sdxl_train.ranks import ShareOut
    from sdxl_train.validation import ValidationResult


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as observers see it.

    Attributes:
        config: Its checked options.
        plan: What it will do.
        assembly: The model and the network; an observer must leave them as they are.
        output_dir: Where its files go.
        name: Stem of the names of its files.
        seed: Its seed; observers derive theirs from it.
        counts: How long it is.
        first_step: Optimizer steps that count as done before: 0 unless it goes on from others.
        resolution: The largest (width, height) that it trains at.
        history: The numbers of the steps so far.
        notes: What observers add to ``NAME.run.json``, each under a name of its own: plain JSON
            values. A run that goes on from a state with a record beside it begins with those.
        earlier_folder: Where the state lies that it goes on from, with that record; None without.
        document: Gives what ``NAME.run.json`` would hold now.
        tell: Tells every observer of an event that happens in one:
            ``run.tell("images_sampled", run=run, images=...)``.
        evaluation: Gives a context in which training stands still, for who uses the model beside
            it: ``with run.evaluation(): ...``. See :meth:`.Evaluation.pause`.
        stopping: Tells whether a signal asked the run to stop: long work may leave the rest out.
        main: Whether this is the process that writes files. The others have only observers that
            act everywhere (:attr:`.Observer.everywhere`).
        share_out: Deals work to all processes and gives the results in order, in every process:
            ``run.share_out(pieces, do)``, where ``do(own_pieces)`` yields a result for each.
            For observers that act everywhere, and values that can be pickled.
    """

    config: RunConfig
    plan: Plan
    assembly: Assembly
    output_dir: Path
    name: str
    seed: int
    counts: StepCounts
    first_step: int
    resolution: tuple[int, int]
    history: History
    notes: dict[str, Any]
    earlier_folder: Path | None
    document: Callable[[], dict[str, Any]]
    tell: Callable[..., None]
    evaluation: Callable[[], AbstractContextManager[None]]
    stopping: Callable[[], bool]
    main: bool
    share_out: ShareOut


@dataclass(kw_only=True)
class RunResult:
    """How a run ended.

    Attributes:
        exit_code: 0 when it came to its end; 128 plus the signal that stopped it.
        steps: Optimizer steps done.
        skipped_steps: Those of them that an fp16 overflow left without effect, those before the
            run was resumed included.
        files: The networks it wrote that are still there.
        final_loss: Mean loss of the last step.
        validations: The losses on held-out images, in the order of steps, those before the run was
            resumed included.
        stopped_early: Whether ``--early_stop_patience`` ended it.
        observer_failures: What went wrong in which observer.
    """

    exit_code: int = 0
    steps: int = 0
    skipped_steps: int = 0
    files: list[Path] = field(default_factory=list)
    final_loss: float | None = None
    validations: list[ValidationResult] = field(default_factory=list)
    stopped_early: bool = False
    observer_failures: dict[str, str] = field(default_factory=dict)
