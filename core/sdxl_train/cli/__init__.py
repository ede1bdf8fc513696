"""The command line: which command, with which words, and what exit code it ends with.

0 done, 1 failed while running, 2 the input is wrong, 128 + signal interrupted and saved.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sdxl_train.cli import components, plan, plugins, train
from sdxl_train.cli.console import configure_logging, report
from sdxl_train.cli.help import show_help, show_usage
from sdxl_train.errors import SdxlTrainError, UserError
from sdxl_train.settings import from_words, merge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sdxl_train.cli.invocation import Invocation

CORE_COMMANDS: dict[str, Callable[[Invocation], int]] = {
    "plan": plan.run,
    "plugins": plugins.run,
    "components": components.run,
}
"""The commands of the framework itself. Plugins register the others."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``sdxl-train`` with these words and give the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    configure_logging()
    if not words:
        show_usage()
        return 2
    try:
        return _dispatch(words)
    except UserError as error:
        report(error)
        return 2
    except SdxlTrainError as error:
        report(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; that is its business.
        sys.stderr.close()
        return 0


def _dispatch(words: list[str]) -> int:
    from sdxl_train.cli.invocation import Invocation

    command = words.pop(0) if not words[0].startswith("-") else None
    if words == ["--version"]:
        from sdxl_train._version import __version__

        print(f"sdxl-train {__version__}")
        return 0
    wants_help = any(word in ("-h", "--help") for word in words)
    words = [word for word in words if word not in ("-h", "--help")]
    notices: list[str] = []
    given, leading = from_words(words, notices)
    if wants_help:
        return show_help(command, Invocation(given, leading, notices), CORE_COMMANDS)
    invocation = Invocation(merge(given), leading, notices)
    if command is None:
        return train.run(invocation)
    if command in CORE_COMMANDS:
        return CORE_COMMANDS[command](invocation)
    return invocation.run_plugin_command(command, list(CORE_COMMANDS))
