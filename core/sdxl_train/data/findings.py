"""What a scan has to say: problems, warnings, remarks on files, and what is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A file that is left out, and why."""

    path: Path
    reason: str


class Remarks:
    """Remarks on files, told once each with a count and the first few files."""

    def __init__(self) -> None:
        self._paths: dict[str, list[Path]] = {}

    def add(self, remark: str, path: Path) -> None:
        """Make a remark on a file."""
        self._paths.setdefault(remark, []).append(path)

    def lines(self) -> list[str]:
        """Give one line for each remark."""
        lines = []
        for remark, paths in self._paths.items():
            shown = ", ".join(str(path) for path in paths[:5])
            more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
            files = "1 file" if len(paths) == 1 else f"{len(paths)} files"
            lines.append(f"{files}: {remark}: {shown}{more}")
        return lines


class Findings:
    """Collects what the scan of all datasets finds.

    Args:
        skip_bad: Leave out images that cannot be used, instead of making problems of them.
    """

    def __init__(self, *, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.skipped: list[Skipped] = []
        self.remarks = Remarks()

    def problem(self, place: str, message: str, remedy: str = "") -> None:
        """Note something that stops the run."""
        self.problems.append(Problem(place=place, message=message, remedy=remedy))

    def bad_image(self, path: Path, message: str) -> None:
        """Note a file that cannot be used as an image."""
        if self.skip_bad:
            self.skipped.append(Skipped(path=path, reason=message))
            self.remarks.add("left out, it cannot be used (--on_bad_image skip)", path)
            return
        remedy = "replace or remove the file, or leave such files out with --on_bad_image skip"
        self.problem(str(path), message, remedy)
