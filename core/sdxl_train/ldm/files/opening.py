"""Files of networks that are to be used, and what is wrong with them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sdxl_train.errors import Problem, UserError
from sdxl_train.ldm.files.network_file import NetworkFile
from sdxl_train.ldm.headers import BadFileError, counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from sdxl_train.ldm.family import Family
    from sdxl_train.ldm.headers import Fault

_log = logging.getLogger(__name__)


def open_networks(
    paths: Iterable[Path], family: Family, problems: list[Problem], place: str | None = None
) -> list[NetworkFile]:
    """Read the headers of networks; what is wrong with them is added to the problems.

    Problems are at the option ``place``, or at the file that they are of.
    """
    files: list[NetworkFile] = []
    for path in paths:
        faults: list[Fault] = []
        try:
            file = NetworkFile.open(path, family)
            faults += file.faults()
            files.append(file)
        except BadFileError as error:
            faults.append(error.fault)
        problems += [
            Problem(place=place or str(path), message=fault.message, remedy=fault.remedy)
            for fault in faults
        ]
    return files


def open_network(path: Path, family: Family) -> NetworkFile:
    """Read the header of one network, look at its values, and log what is odd about it.

    Raises:
        UserError: With everything that is wrong with it.
    """
    problems: list[Problem] = []
    files = open_networks([path], family, problems)
    if not problems:
        problems += value_problems(files[0])
    if problems:
        raise UserError(problems)
    for warning in files[0].warnings():
        _log.warning(warning)
    return files[0]


def value_problems(file: NetworkFile) -> Iterator[Problem]:
    """Read all values of a network, and yield a problem if some are not finite."""
    from sdxl_train.finite import is_finite

    with file.weights() as read:
        bad = [
            module.keys.get(name, name)
            for module in file.modules.values()
            for name, tensor in read(module).items()
            if not is_finite(tensor)
        ]
    if bad:
        yield Problem(
            place=str(file.path),
            message=f"{file.path.name} holds values that are not finite, in {counted(bad)}",
            remedy="use another file: this network was saved after its training failed",
        )
