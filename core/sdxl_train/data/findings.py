"""What a scan has to say: problems, warnings, remarks on files, and what is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_train.errors import Problem
from sdxl_train.wording import in_one_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A file that is left out, and why."""

    path: Path
    reason: str


class Remarks:
    """Remarks on files, told once each with a count and the first few files."""

    def __init__(self) -> None:
        self._files: dict[str, dict[str, None]] = {}

    def add(self, remark: str, path: Path, detail: str = "") -> None:
        """Make a remark on a file, with what is its own in it."""
        shown = in_one_line(str(path))
        named = f"{shown} ({detail})" if detail else shown
        self._files.setdefault(remark, {})[named] = None

    def lines(self) -> list[str]:
        """Give one line for each remark."""
        lines = []
        for remark, files in self._files.items():
            named = list(files)
            shown = ", ".join(named[:5])
            more = f" and {len(named) - 5} more" if len(named) > 5 else ""
            count = "1 file" if len(named) == 1 else f"{len(named)} files"
            lines.append(f"{count}: {remark}: {shown}{more}")
        return lines


MOST_FOLDERS = 20
"""Folders whose captions are remarked on one by one."""


class Findings:
    """Collects what the scan of all datasets finds.

    Args:
        skip_bad: Leave out images that cannot be used, instead of making problems of them.
        strict_captions: Make problems of captions that are missing, empty or not UTF-8.
    """

    def __init__(self, *, skip_bad: bool, strict_captions: bool = False) -> None:
        self.skip_bad = skip_bad
        self.strict_captions = strict_captions
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.skipped: list[Skipped] = []
        self.remarks = Remarks()
        self._of_captions: dict[str, list[str]] = {}

    def captions(self, source: Path, remarks: Sequence[str]) -> None:
        """Note what is odd about the captions of a folder or metadata file."""
        if remarks:
            self._of_captions.setdefault(str(source), []).extend(remarks)

    def caption_lines(self) -> list[str]:
        """Give the remarks on captions, those on a few of thousands of folders."""
        sources = list(self._of_captions)
        lines = [
            f"{source}: {remark}"
            for source in sources[:MOST_FOLDERS]
            for remark in self._of_captions[source]
        ]
        left = len(sources) - MOST_FOLDERS
        if left > 0:
            lines.append(f"{left} more folders have captions to be remarked on")
        return lines

    def problem(self, place: str, message: str, remedy: str = "") -> None:
        """Note something that stops the run."""
        self.problems.append(Problem(place=place, message=message, remedy=remedy))

    def poor_caption(self, path: Path, remark: str) -> None:
        """Note a caption that can be used, though hardly as it was meant."""
        if self.strict_captions:
            self.problem(str(path), f"caption {remark}", "mend it, or drop --strict_captions")
        else:
            self.remarks.add(f"caption {remark}", path)

    def bad_image(self, path: Path, message: str, *, place: str | None = None) -> None:
        """Note a file that cannot be used as an image, and where it is named if not by itself."""
        if self.skip_bad:
            self.skipped.append(Skipped(path=path, reason=message))
            self.remarks.add("left out (--on_bad_image skip)", path, message)
            return
        remedy = "replace or remove the file, or leave such files out with --on_bad_image skip"
        self.problem(place or str(path), message if place is None else f"{path}: {message}", remedy)
