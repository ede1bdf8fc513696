"""Files of sample prompts as sd-scripts reads them: a line for each picture, or TOML, or JSON."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from sdxl_train import Field, Problem, UserError, read_text, read_toml
from sdxl_train.ldm import SamplerName  # noqa: TC001 - pydantic needs it

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

LETTERS: Final = {
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "n": "negative_prompt",
    "ss": "sample_sampler",
    "am": "multiplier",
    "g": "guidance_scale",
    "cn": "controlnet_image",
    "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
}
"""The key that each ``--x`` of a line stands for."""
_FOREIGN: Final = (
    "guidance_scale",
    "controlnet_image",
    "cfg_trunc_ratio",
    "renorm_cfg",
    "flow_shift",
)
_SIDE_MULTIPLE: Final = 8
_SMALLEST_SIDE: Final = 64

_Text = Annotated[str, StringConstraints(strip_whitespace=True)]


class PromptOptions(BaseModel):
    """One picture to sample, by the keys of TOML and JSON files."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: Annotated[_Text, StringConstraints(min_length=1)]
    negative_prompt: _Text = ""
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    sample_steps: int = Field(30, ge=1, le=1000)
    scale: float = Field(7.5, ge=0)
    sample_sampler: SamplerName | None = None
    multiplier: float = 1.0
    guidance_scale: float | None = None
    controlnet_image: str | None = None
    cfg_trunc_ratio: float | None = None
    renorm_cfg: float | None = None
    flow_shift: float | None = None


@dataclass(frozen=True, kw_only=True)
class SamplePrompt:
    """A picture to sample, and where it stands.

    Attributes:
        options: What is asked for.
        place: Gives the place of a key of it.
    """

    options: PromptOptions
    place: Callable[[str], str]

    def side(self, name: str) -> int | None:
        """Give the width or height, rounded to what the model can make; None if it is not set."""
        asked: int | None = getattr(self.options, name)
        return None if asked is None else rounded(asked)

    def remarks(self) -> Iterator[str]:
        """Yield what the picture will have otherwise than asked for."""
        for name in ("width", "height"):
            asked, side = getattr(self.options, name), self.side(name)
            if asked != side:
                yield (
                    f"{self.place(name)}: {asked} becomes {side}: sides are multiples of "
                    f"{_SIDE_MULTIPLE}, at least {_SMALLEST_SIDE} pixels"
                )
        for name in _FOREIGN:
            if getattr(self.options, name) is not None:
                yield f"{self.place(name)}: {name} is of other models and has no effect on SDXL"


def rounded(side: int) -> int:
    """Round a side down as sd-scripts does."""
    return max(_SMALLEST_SIDE, side - side % _SIDE_MULTIPLE)


def read_prompts(path: Path) -> list[SamplePrompt]:
    """Read a file of prompts.

    Raises:
        UserError: With everything that is wrong in it, by line or by entry.
    """
    readers = {".txt": _from_lines, ".toml": _from_toml, ".json": _from_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError.of(
            str(path), f"ends in '{path.suffix}', expected .txt, .toml or .json", "rename the file"
        )
    prompts: list[SamplePrompt] = []
    problems: list[Problem] = []
    for values, place in reader(path, problems):
        try:
            prompts.append(SamplePrompt(options=PromptOptions(**values), place=place))
        except ValidationError as error:
            problems.extend(_problems(error, place))
    if not prompts and not problems:
        problems.append(
            Problem(place=str(path), message="holds no prompt", remedy="write one on a line")
        )
    if problems:
        raise UserError(problems)
    return prompts


_Entries: TypeAlias = "Iterator[tuple[Mapping[str, Any], Callable[[str], str]]]"


def _from_lines(path: Path, problems: list[Problem]) -> _Entries:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip() and not line.startswith("#"):
            yield _line(line, f"{path}:{number}", problems)


def _line(
    line: str, where: str, problems: list[Problem]
) -> tuple[dict[str, str], Callable[[str], str]]:
    """Part a line into the prompt and its options."""
    prompt, *options = re.split(r"(?:^|\s)--", line.strip())
    values = {"prompt": prompt}
    flags = {key: f"--{letter}" for letter, key in LETTERS.items()}
    for option in options:
        letter, _, value = option.partition(" ")
        key = LETTERS.get(letter.lower())
        if key is None:
            near = difflib.get_close_matches(letter.lower(), LETTERS, n=1)
            known = ", ".join(f"--{name}" for name in LETTERS)
            problems.append(
                Problem(
                    place=where,
                    message=f"there is no option --{letter}"
                    + (f"; did you mean --{near[0]}?" if near else ""),
                    remedy=f"options are {known}",
                )
            )
        elif key in values:
            problems.append(
                Problem(place=where, message=f"--{letter} is given twice", remedy="remove one")
            )
        else:
            values[key] = value.strip()

    def place(key: str) -> str:
        return f"{where} {flags[key]}" if key in flags else where

    return values, place


def _from_toml(path: Path, problems: list[Problem]) -> _Entries:
    document, lines = read_toml(path)
    shared = document.get("prompt")
    others = sorted(document.keys() - {"prompt"})
    if not isinstance(shared, dict) or others:
        problems.append(
            Problem(
                place=str(path),
                message=f"has {', '.join(others) or 'no table'} at its top, expected [prompt]",
                remedy="write keys for all pictures into [prompt], each picture's own into "
                "[[prompt.subset]]",
            )
        )
        return
    common = {key: value for key, value in shared.items() if key != "subset"}
    own = shared.get("subset", [{}])
    if not isinstance(own, list) or not all(isinstance(subset, dict) for subset in own):
        problems.append(
            Problem(place=f"{path} prompt.subset", message="expected tables [[prompt.subset]]")
        )
        return
    for index, subset in enumerate(own):

        def place(key: str, index: int = index) -> str:
            inner = ("prompt", "subset", index)
            line = lines.get((*inner, key)) or lines.get(("prompt", key)) or lines.get(inner)
            return f"{path}:{line} {key}" if line else f"{path} {key}"

        yield {**common, **subset}, place


def _from_json(path: Path, problems: list[Problem]) -> _Entries:
    try:
        document = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError.of(
            f"{path}:{error.lineno}:{error.colno}", f"no JSON: {error.msg}"
        ) from None
    except RecursionError:
        raise UserError.of(str(path), "is nested too deeply", "write it flat") from None
    if not isinstance(document, list):
        problems.append(
            Problem(place=str(path), message="expected a list of prompts", remedy="put it in [ ]")
        )
        return
    for number, entry in enumerate(document, start=1):
        where = f"{path} entry {number}"
        if isinstance(entry, str):
            yield _line(entry, where, problems)
        elif isinstance(entry, dict):
            yield entry, partial(_key_in, where)
        else:
            problems.append(
                Problem(place=where, message=f"is {entry!r}, expected a text or an object")
            )


def _key_in(where: str, key: str) -> str:
    return f"{where} {key}"


def _problems(error: ValidationError, place: Callable[[str], str]) -> Iterator[Problem]:
    for fault in error.errors():
        key = str(fault["loc"][0])
        message = fault["msg"]
        if fault["type"] in ("missing", "string_too_short") and key == "prompt":
            message, remedy = "there is no prompt", "begin with the prompt"
        elif fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, PromptOptions.model_fields, n=1)
            message = f"there is no key {key}" + (f"; did you mean {near[0]}?" if near else "")
            remedy = f"keys are {', '.join(PromptOptions.model_fields)}"
        else:
            message, remedy = f"got {fault['input']!r}: {fault['msg']}", ""
        yield Problem(place=place(key), message=message, remedy=remedy)
