"""Metadata files: captions and tags of many images in one JSON or JSONL file, as in sd-scripts.

JSON holds one object, from image to ``{"caption": ..., "tags": ..., "image_size": [w, h]}``. JSONL
holds one such object on each line, with the image as ``image_path``. An image is named by its path,
or by its path in the subset's ``image_dir``, where its ending may be left out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_train.data.captions import CaptionFile, bad_brace
from sdxl_train.data.findings import Skipped
from sdxl_train.data.folders import lies_in
from sdxl_train.data.images import formats, is_image_name
from sdxl_train.data.json_files import line_of_key, parse_json
from sdxl_train.errors import UserError
from sdxl_train.toml_files import read_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sdxl_train.data.buckets import Size
    from sdxl_train.data.findings import Findings

_USED = frozenset({"caption", "tags", "image_size", "image_path"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """What a metadata file says of an image.

    Attributes:
        path: The image.
        place: Where the file says it.
        caption: Its caption, the tags behind each of its lines; None if it has neither.
        size: Its (width, height) by the file, if that tells.
    """

    path: Path
    place: str
    caption: CaptionFile | None
    size: Size | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """One entry as it stands in the file."""

    line: int | None
    key: str
    fields: Any


def read_annotations(
    path: Path, image_dir: Path | None, separator: str, findings: Findings
) -> list[Annotation]:
    """Read a metadata file and find its images.

    Args:
        path: The file.
        image_dir: Where images are whose names are not whole paths.
        separator: What stands between a caption and its tags.
        findings: Gets what is wrong with entries, and the images that no entry names.

    Raises:
        UserError: If the file as a whole is not what it must be.
    """
    problems = len(findings.problems)
    in_lines = path.suffix.lower() == ".jsonl"
    entries = list(_lines(path, findings) if in_lines else _keys(path))
    if not entries and problems == len(findings.problems):
        raise UserError.of(str(path), "names no images", "write an entry for each image")
    reader = _EntryReader(path, image_dir, separator, findings)
    annotations = [found for entry in entries if (found := reader.read(entry))]
    reader.tell_missing(len(entries))
    findings.skipped += reader.files.unnamed(annotation.path for annotation in annotations)
    return annotations


def _keys(path: Path) -> Iterator[_Entry]:
    text = read_text(path)
    document = parse_json(text, path)
    if not isinstance(document, dict):
        raise UserError.of(
            str(path),
            "is not an object of images",
            'write {"image.png": {"caption": "..."}, ...}, or one object a line in a .jsonl file',
        )
    for key, fields in document.items():
        # Only what is wrong needs its line; to look for each would take minutes.
        sound = isinstance(fields, dict) and not any(_faults(fields))
        yield _Entry(line=None if sound else line_of_key(text, key), key=key, fields=fields)


def _lines(path: Path, findings: Findings) -> Iterator[_Entry]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = parse_json(line, path, line=number)
        except UserError as error:
            findings.problems += error.problems
            continue
        key = fields.get("image_path") if isinstance(fields, dict) else None
        yield _Entry(line=number, key=key if isinstance(key, str) else "", fields=fields)


_PATH_ELSEWHERE = ("file_name", "filename", "file", "path", "image", "img")
"""What other programs call the path of an image."""


class _EntryReader:
    """Reads the entries of one file."""

    def __init__(
        self, path: Path, image_dir: Path | None, separator: str, findings: Findings
    ) -> None:
        self.path = path
        self.image_dir = image_dir
        self.separator = separator
        self.findings = findings
        self.files = _Files(image_dir)
        self._places: dict[Path, str] = {}
        self._missing: list[tuple[Path, str]] = []

    def read(self, entry: _Entry) -> Annotation | None:
        """Read one entry; None if it has a mistake."""
        place = f"{self.path}:{entry.line}" if entry.line else str(self.path)
        place += f": {entry.key}" if entry.key else ""
        if not isinstance(entry.fields, dict):
            self.findings.problem(
                place, f"{entry.fields!r} is not an object", 'write {"caption": "..."}'
            )
            return None
        faults = list(_faults(entry.fields))
        if not entry.key:
            other = next((name for name in _PATH_ELSEWHERE if name in entry.fields), None)
            faults.append(
                f"has no image_path: {other} is called so here"
                if other
                else "has no image_path: write the path of the image"
            )
        for fault in faults:
            self.findings.problem(place, fault)
        if faults:
            return None
        for name in entry.fields.keys() - _USED:
            self.findings.remarks.add(f"its field {name} is not used", self.path)
        found = self._find(entry.key, place)
        return self._annotation(found, place, entry.fields) if found else None

    def tell_missing(self, num_entries: int) -> None:
        """Complain of the images that are not there: in one line if none is."""
        if len(self._missing) == num_entries > 1:
            first = self._missing[0][0]
            self.findings.problem(
                str(self.path),
                f"none of its {num_entries} images is there, such as {first}",
                "set image_dir to the folder that the names begin in",
            )
            return
        for path, place in self._missing:
            self.findings.bad_image(path, "there is no such image", place=place)

    def _find(self, key: str, place: str) -> Path | None:
        given = Path(key)
        homes = [self.image_dir / given] if self.image_dir else []
        found = next((f for path in [*homes, given] if (f := self.files.find(path))), None)
        if found is None:
            if not (homes or given.is_absolute()):
                remedy = "set image_dir of the subset"
                self.findings.problem(place, "is not a whole path, nor one from here", remedy)
            else:
                self._missing.append(([*homes, given][0], place))
            return None
        if fault := self._astray(given, found):
            self.findings.problem(place, fault, "keep the images of a dataset in its image_dir")
            return None
        if not is_image_name(found.name):
            types = ", ".join(formats())
            self.findings.bad_image(found, f"is of no supported type ({types})", place=place)
            return None
        if found in self._places:
            self.findings.problem(
                place,
                f"names {found} again, after {self._places[found]}",
                "leave one entry for each image",
            )
            return None
        self._places[found] = place
        return found

    def _astray(self, given: Path, found: Path) -> str:
        """Say how a name leads out of the dataset, which may be anybody's; empty if it does not."""
        if ".." in given.parts:
            return "leads upwards by '..'"
        if self.image_dir and not lies_in(self._root, os.path.realpath(found)):
            return f"does not lie in {self.image_dir}"
        return ""

    @cached_property
    def _root(self) -> str:
        return os.path.realpath(self.image_dir or "")

    def _annotation(self, path: Path, place: str, fields: dict[str, Any]) -> Annotation:
        caption = _joined(fields.get("caption"), fields.get("tags"), self.separator)
        size = fields.get("image_size")
        return Annotation(
            path=path, place=place, caption=caption, size=(size[0], size[1]) if size else None
        )


def _faults(fields: dict[str, Any]) -> Iterator[str]:
    for name in ("caption", "tags"):
        if not isinstance(value := fields.get(name), (str, type(None))):
            yield f"{name} is {value!r}, expected text"
    size = fields.get("image_size")
    if size is None:
        return
    numbers = size if isinstance(size, list) else []
    if len(numbers) != 2 or any(type(n) is not int or n < 1 for n in numbers):
        yield f"image_size is {size!r}, expected [width, height] in pixels"


def _joined(caption: str | None, tags: str | None, separator: str) -> CaptionFile | None:
    """Put the tags behind each line of the caption; line breaks among tags part them too."""
    lines = _filled(caption)
    ending = separator.join(_filled(tags))
    texts = [f"{line}{separator}{ending}" if ending else line for line in lines] or [ending]
    if texts == [""]:
        return None
    found = ((n, column) for n, line in enumerate(texts, 1) if (column := bad_brace(line)))
    return CaptionFile("\n".join(texts), bad_brace=next(found, None))


def _filled(text: str | None) -> list[str]:
    return [words for line in (text or "").splitlines() if (words := " ".join(line.split()))]


class _Files:
    """The images in the folders that entries name, each folder listed once."""

    def __init__(self, image_dir: Path | None) -> None:
        self._image_dir = image_dir
        self._folders: dict[Path, dict[str, str]] = {}

    def find(self, path: Path) -> Path | None:
        """Give the image at a path, whose ending may be missing."""
        names = self._names(path.parent)
        name = names.get(path.name)
        return path.with_name(name) if name else None

    def unnamed(self, used: Iterable[Path]) -> list[Skipped]:
        """List the images in ``image_dir`` that are not used."""
        if self._image_dir is None:
            return []
        named = set(used)
        paths = (self._image_dir / name for name in self._names(self._image_dir).values())
        reason = "an image that the metadata file does not name"
        left = [path for path in dict.fromkeys(paths) if path not in named]
        return [Skipped(path=path, reason=reason) for path in left if is_image_name(path.name)]

    def _names(self, folder: Path) -> dict[str, str]:
        """Give the files of a folder, under their names and those of images under their stems."""
        names = self._folders.get(folder)
        if names is None:
            listed = sorted(os.listdir(folder)) if folder.is_dir() else []  # noqa: PTH208 - fast
            names = {}
            for name in listed:
                if is_image_name(name):
                    names.setdefault(name[: name.rfind(".")], name)
            names |= {name: name for name in listed}
            self._folders[folder] = names
        return names
