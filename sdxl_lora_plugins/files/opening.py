"""Files of networks that are to be used, and what is wrong with them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sdxl_lora_plugins.files.network_file import NetworkFile
from sdxl_lora_plugins.model.headers import BadFileError
from sdxl_train import Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_log = logging.getLogger(__name__)


def open_networks(paths: Iterable[Path], problems: list[Problem]) -> list[NetworkFile]:
    """Read the headers of networks; what is wrong with them is added to the problems."""
    files: list[NetworkFile] = []
    for path in paths:
        try:
            file = NetworkFile.open(path)
        except BadFileError as error:
            fault = error.fault
            problems.append(Problem(place=str(path), message=fault.message, remedy=fault.remedy))
            continue
        problems += [
            Problem(place=str(path), message=fault.message, remedy=fault.remedy)
            for fault in file.faults()
        ]
        files.append(file)
    return files


def open_network(path: Path) -> NetworkFile:
    """Read the header of one network, and log what is odd about it.

    Raises:
        UserError: With everything that is wrong with it.
    """
    problems: list[Problem] = []
    files = open_networks([path], problems)
    if problems:
        raise UserError(problems)
    for warning in files[0].warnings():
        _log.warning(warning)
    return files[0]
