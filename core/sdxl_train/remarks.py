"""Which records of the log are about the run, and those of them that warn."""

from __future__ import annotations

import logging


def concerns_the_run(record: logging.LogRecord) -> bool:
    """Let our packages and the enabled plugins speak; of other libraries only errors.

    Their warnings are for programmers: an optional accelerator that is absent, a text that is cut
    later anyway. The host sets a level on the packages that take part.
    """
    package = logging.getLogger(record.name.partition(".")[0])
    return record.levelno >= logging.ERROR or package.level != logging.NOTSET


class Remarks(logging.Handler):
    """Keeps the warnings of a run, each text once.

    Attributes:
        texts: They, in order.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self.addFilter(concerns_the_run)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a text that is new."""
        text = record.getMessage()
        if text not in self.texts:
            self.texts.append(text)

    def __enter__(self) -> Remarks:
        """Listen to all loggers."""
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        """Listen no more."""
        logging.getLogger().removeHandler(self)
