"""What ``NAME.run.json`` says of a run as it goes; the form of the file is document.py's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sdxl_train.document import machine, peak_memory, speed, with_paths
from sdxl_train.remarks import Remarks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

    from sdxl_train.observed import Run, RunResult
    from sdxl_train.planning import Plan
    from sdxl_train.preflight import Prepared
    from sdxl_train.record import RunRecord

_OF_THE_PLAN = ("dataset", "saves", "samples", "validations", "modules", "groups", "memory")


class RunDocument:
    """All that is known of a run, for the file and for its observers.

    Args:
        prepared: The run.
        plan: Its plan.
        record: Its facts.
        result: How it goes.
        device: What computes.

    Attributes:
        status: How it stands: ``running``, or how it ended.
        remarks: Warnings that were told since it began.
    """

    def __init__(
        self,
        prepared: Prepared,
        plan: Plan,
        record: RunRecord,
        result: RunResult,
        device: torch.device,
    ) -> None:
        self.status = "running"
        self.remarks = Remarks()
        self._datasets = prepared.scan.datasets
        self._facts = record.facts()
        planned = plan.as_json()
        self._plan = {name: planned[name] for name in _OF_THE_PLAN}
        self._warnings = plan.warnings
        self._result = result
        self._device = device

    def content(
        self, run: Run, files: Iterable[Path], failures: Mapping[str, str]
    ) -> dict[str, Any]:
        """Give all that is known now, as plain JSON values.

        Args:
            run: The run as observers see it.
            files: The networks that it wrote.
            failures: What went wrong in which observer.
        """
        history, result = run.history, self._result
        history.read()
        images = [image for dataset in self._datasets for image in dataset.images]
        return {
            **self._facts,
            "name": run.name,
            "machine": machine(self._device),
            "plan": self._plan,
            "warnings": list(dict.fromkeys([*self._warnings, *self.remarks.texts])),
            "history": history.as_json(),
            "loss_by_timestep": history.loss_by_timestep(),
            "loss_by_image": with_paths(
                history.loss_by_image(), {image.key: image.path for image in images}
            ),
            "speed": speed(history),
            "memory": peak_memory(self._device),
            "notes": run.notes,
            "results": {
                "status": self.status,
                "steps": result.steps,
                "skipped_steps": result.skipped_steps,
                "final_loss": result.final_loss,
                "validations": [each.as_json() for each in result.validations],
                "files": [path.name for path in files],
                "observer_failures": dict(failures),
                "written_at": time.time(),
            },
        }
