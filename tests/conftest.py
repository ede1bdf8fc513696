"""What every test of this repository starts with."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, so that no process waits for another at the end."""
    items.sort(key=lambda item: "end_to_end" not in item.path.parts)


def pytest_collection_finish() -> None:
    """Let the garbage collector leave alone what is there for good: it took a sixth of the time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def log_as_in_a_new_process() -> Iterator[None]:
    """Take back what a command run within this process did to the log: its console, its levels."""
    _reset_log()
    yield
    _reset_log()


def _reset_log() -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler).__module__.startswith("sdxl_train."):
            root.removeHandler(handler)
    for name, logger in logging.Logger.manager.loggerDict.items():
        # To set a level makes every logger forget what it knows of the others: only where it helps.
        if name.startswith("sdxl_") and isinstance(logger, logging.Logger) and logger.level:
            logger.setLevel(logging.NOTSET)
