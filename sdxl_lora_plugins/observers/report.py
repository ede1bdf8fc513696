"""The report of a run. Light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sdxl_train import Field, Observer

if TYPE_CHECKING:
    from sdxl_train import Run


class Report(Observer):
    """Write NAME.report.html, a page about the run, anew as it goes."""

    always: ClassVar[bool] = True
    unlimited: ClassVar[bool] = True

    report: bool = Field(True, description="Write NAME.report.html: open it in any browser.")

    def active(self) -> bool:
        """Tell whether a report is wanted."""
        return self.report

    def build(self, run: Run) -> object:
        """Build what writes the report of this run."""
        from sdxl_lora_plugins.observers.reporting import Reporting

        return Reporting(run)
