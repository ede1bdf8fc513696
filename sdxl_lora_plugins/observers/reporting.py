"""Note what a report shows beside the framework's numbers, and write the report as the run goes."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from sdxl_lora_plugins.observers.flops import unknown_utilization, utilization
from sdxl_lora_plugins.observers.norms import block_norms
from sdxl_lora_plugins.report.page import ShownRun, page
from sdxl_lora_plugins.report.pictures import Pictures
from sdxl_train import Pace, write_atomically
from sdxl_train.ldm import LdmModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdxl_train import Run, SampledImage, StepResult

logger = logging.getLogger(__name__)

_NUM_NORMS = 40
"""Times that the norms of blocks are measured in a run, at most."""
_STEPS_BETWEEN_NORMS = 20
"""The least; to measure them takes up to half a step."""


class Reporting:
    """Writes the report of one run.

    Its notes in ``NAME.run.json`` are ``samples``, ``weight_norms`` and ``mfu``.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.path = run.output_dir / f"{run.name}.report.html"
        self.pace = Pace()
        self.pictures = Pictures()
        self.norms_every = max(_STEPS_BETWEEN_NORMS, run.counts.total // _NUM_NORMS)
        self._keep_earlier_notes()

    def _keep_earlier_notes(self) -> None:
        """Keep of the notes of the run that this one goes on from what is not done again."""
        notes, start = self.run.notes, self.run.first_step
        notes["samples"] = [
            {**sample, "path": sample["path"] and self._path_from_here(sample["path"])}
            for sample in notes.get("samples", [])
            if sample["step"] <= start
        ]
        norms = notes.get("weight_norms", {})
        count = sum(step <= start for step in norms.get("steps", []))
        notes["weight_norms"] = {
            "steps": norms.get("steps", [])[:count],
            "blocks": {name: each[:count] for name, each in norms.get("blocks", {}).items()},
            "why": None,
        }

    def _path_from_here(self, path: str) -> str:
        """Give where a picture of the earlier run lies, seen from this one's folder."""
        earlier = self.run.earlier_folder
        return os.path.relpath(earlier / path, self.run.output_dir) if earlier else path

    def run_started(self) -> None:
        """Write the first report, before the first step."""
        self.run.notes["mfu"] = unknown_utilization("told when the run is over")
        if self.run.first_step == 0:
            self._note_norms(0)
        self._write()

    def step_finished(self, step: StepResult) -> None:
        """Measure and write if it is time."""
        last = step.step == self.run.counts.total
        if step.step % self.norms_every == 0 or last:
            self._note_norms(step.step)
        if self.pace.is_due():
            self._write()

    def validation_finished(self) -> None:
        """Show the new result soon."""
        if self.pace.is_due():
            self._write()

    def images_sampled(self, images: Sequence[SampledImage]) -> None:
        """Note the pictures."""
        folder = self.run.output_dir
        for image in images:
            request = image.request
            self.run.notes.setdefault("samples", []).append(
                {
                    "step": image.step,
                    "epoch": image.epoch,
                    "index": image.index,
                    "path": image.path and os.path.relpath(image.path, folder),
                    "fault": image.fault,
                    "prompt": request.prompt,
                    "negative_prompt": request.negative_prompt,
                    "width": request.width,
                    "height": request.height,
                    "steps": request.steps,
                    "guidance_scale": request.guidance_scale,
                    "seed": request.seed,
                    "sampler": request.sampler,
                    "multiplier": request.multiplier,
                }
            )
        if self.pace.is_due():
            self._write()

    def run_finished(self) -> None:
        """Write the last report."""
        self.run.notes["mfu"] = utilization(self.run)
        self._write()
        logger.info("report: %s (written in %.1f s in all)", self.path, self.pace.spent)

    def _note_norms(self, step: int) -> None:
        noted: dict[str, Any] = self.run.notes["weight_norms"]
        model = self.run.config.model
        norms = {}
        if isinstance(model, LdmModel):
            norms = block_norms(self.run.assembly.adapter.state_dict(), model.family)
        if not norms:
            noted["why"] = "the norms of this network's modules are not known"
            return
        noted["steps"].append(step)
        for name, norm in norms.items():
            noted["blocks"].setdefault(name, []).append(float(f"{norm:.6g}"))

    def _write(self) -> None:
        with self.pace.at_work():
            shown = ShownRun(
                name=self.run.name, document=self.run.document(), folder=self.run.output_dir
            )
            write_atomically(self.path, page([shown], self.pictures))
