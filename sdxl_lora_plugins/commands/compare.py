"""``sdxl-train compare``: runs side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sdxl_train import Command, Field, Problem, UserError, write_atomically

if TYPE_CHECKING:
    from sdxl_lora_plugins.report.page import ShownRun

_ENDING = ".run.json"
_SCHEMA = 2


class Compare(Command):
    """Set runs side by side on a page: options that differ, curves, losses, sample pictures."""

    positional: ClassVar[tuple[str, ...]] = ("runs",)

    runs: list[Path] = Field(
        description="The runs: NAME.run.json, the report beside it, or the folder of one run."
    )
    output: Path = Field(Path("compare.html"), description="The page to write.")

    def run(self) -> int:
        """Write the page and print where it is."""
        problems: list[Problem] = []
        if len(self.runs) < 2:
            problems.append(
                Problem(
                    place="compare",
                    message=f"got {len(self.runs)} run, expected two or more",
                    remedy="name their .run.json files, or their folders",
                )
            )
        if self.output.suffix.lower() not in (".html", ".htm"):
            problems.append(
                Problem(place="--output", message=f"{self.output} does not end in .html")
            )
        documents: list[tuple[Path, dict[str, Any]]] = []
        for given in self.runs:
            try:
                documents.append(read_run(given))
            except UserError as error:
                problems.extend(error.problems)
        if problems:
            raise UserError(problems)
        from sdxl_lora_plugins.report.page import page
        from sdxl_lora_plugins.report.pictures import Pictures

        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.output, page(_shown(documents), Pictures()))
        print(self.output)
        return 0


def read_run(given: Path) -> tuple[Path, dict[str, Any]]:
    """Find and read the record of a run.

    Raises:
        UserError: If there is none, several, or one that is not to be read.
    """
    path = _record_of(given)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError.of(str(path), f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError.of(str(path), f"is not JSON: {error}") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != _SCHEMA:
        raise UserError.of(
            str(path),
            f"is no record of a run that can be shown: its schema version is {version}, "
            f"expected {_SCHEMA}",
            "name the .run.json of a run of this version of sdxl-train",
        )
    return path, document


def _record_of(given: Path) -> Path:
    if given.name.endswith(".report.html"):
        return given.with_name(given.name.removesuffix(".report.html") + _ENDING)
    if not given.is_dir():
        return given
    found = sorted(given.glob(f"*{_ENDING}"))
    if len(found) != 1:
        named = ", ".join(path.name for path in found[:5]) or "none"
        raise UserError.of(
            str(given), f"has {len(found)} records of runs ({named})", "name one of them"
        )
    return found[0]


def _shown(documents: list[tuple[Path, dict[str, Any]]]) -> list[ShownRun]:
    """Name the runs so that no two names are the same: by their folders, if need be."""
    from sdxl_lora_plugins.report.page import ShownRun

    names = [document["name"] for _, document in documents]
    if len(set(names)) < len(names):
        common = os.path.commonpath([path.resolve().parent for path, _ in documents])
        names = [
            f"{path.resolve().parent.relative_to(common)}/{name}".removeprefix("./")
            for (path, _), name in zip(documents, names, strict=True)
        ]
    if len(set(names)) < len(names):
        names = [f"{number}: {name}" for number, name in enumerate(names, start=1)]
    return [
        ShownRun(name=name, document=document, folder=path.parent)
        for name, (path, document) in zip(names, documents, strict=True)
    ]
