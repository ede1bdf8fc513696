"""What is wrong, told the same way everywhere: place, value, expectation, remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdxl_train.wording import in_one_line

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One mistake in the user's input.

    Attributes:
        place: Where it is: a flag, a file with line and key, a path.
        message: What is wrong there, with the value and what was expected.
        remedy: What to do about it, in a few words; empty where the message says it already.
    """

    place: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        """Render as ``place: message``, the remedy on a line of its own."""
        place = in_one_line(self.place)
        text = f"{place}: {self.message}" if place else self.message
        return f"{text}\n    -> {self.remedy}" if self.remedy else text


class SdxlTrainError(Exception):
    """Base of the errors that this package raises on purpose."""


class UserError(SdxlTrainError):
    """The user's input is wrong. Holds every problem found, not only the first. Exit code 2."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def of(cls, place: str, message: str, remedy: str = "") -> UserError:
        """Make an error of a single problem."""
        return cls([Problem(place=place, message=message, remedy=remedy)])


class TrainingError(SdxlTrainError):
    """The run failed while running, for a reason that its message names. Exit code 1."""


class LostConnectionError(TrainingError):
    """Another of the processes that train together is gone."""


class PluginError(SdxlTrainError):
    """A plugin cannot be used; the message says which, of what distribution, and why."""


class EndedElsewhereError(SdxlTrainError):
    """The run ended in all its processes; another one says why. There is nothing to add."""


class CutOffError(EndedElsewhereError):
    """The others wait until this process is gone, and one of them then says why it ended."""
