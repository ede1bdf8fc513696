"""The command line: which command, with which words, and what exit code it ends with.

0 done, 1 failed while running, 2 the input is wrong, 128 + signal interrupted and saved.
"""

from __future__ import annotations

import atexit
import gc
import sys
import time
from typing import TYPE_CHECKING

from sdxl_train._version import __version__
from sdxl_train.blame import blame
from sdxl_train.cli import cache, components, plan, plugins, schema, train
from sdxl_train.cli.console import configure_output, discard_output, report, warn
from sdxl_train.cli.help import HINT, USAGE, command_help, training_help
from sdxl_train.cli.invocation import Invocation
from sdxl_train.errors import CutOffError, LostConnectionError, SdxlTrainError, UserError
from sdxl_train.launch import launched
from sdxl_train.registry import Registry
from sdxl_train.settings import from_words, merge
from sdxl_train.signals import Terminated, early_signals

if TYPE_CHECKING:
    from collections.abc import Sequence

CORE_COMMANDS = {
    "plan": plan.COMMAND,
    "cache": cache.COMMAND,
    "plugins": plugins.COMMAND,
    "components": components.COMMAND,
    "schema": schema.COMMAND,
}
"""The commands of the framework itself. Plugins register the others."""

_HELP = ("-h", "--help")


PATIENCE = 10
"""Seconds that a process leaves the launcher to hear of the main process's end first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``sdxl-train`` with these words and give the exit code."""
    # At its end Python looks once more through all that torch and the libraries made: 2 s.
    atexit.register(gc.freeze)
    try:
        code = _main(argv)
    except (LostConnectionError, CutOffError) as error:  # nobody is to be waited for
        report(error)
        return 1
    if code and not launched().main:
        # A launcher ends the others as soon as one has failed; the main one may still be speaking.
        time.sleep(PATIENCE)
    return code


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    configure_output()
    if not words:
        print(f"{USAGE}\n{HINT}", file=sys.stderr)
        return 2
    try:
        with early_signals():
            code = _dispatch(words)
        sys.stdout.flush()
    except UserError as error:
        report(error)
        return 2
    except (LostConnectionError, CutOffError):
        raise
    except SdxlTrainError as error:
        report(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143
    except BrokenPipeError:
        discard_output()
        return 0
    return code


def _dispatch(words: list[str]) -> int:
    if words == ["--version"]:
        print(f"sdxl-train {__version__}")
        return 0
    command = None if words[0].startswith("-") else words.pop(0)
    wants_help = any(word in _HELP for word in words)
    notices: list[str] = []
    given, leading = from_words([word for word in words if word not in _HELP], notices)
    invocation = Invocation(given if wants_help else merge(given, notices), leading, notices)
    try:
        return _help(command, invocation) if wants_help else _run(command, invocation)
    except Exception as error:
        blame(error, invocation.host.enabled.values())
        raise


def _run(command: str | None, invocation: Invocation) -> int:
    if command is None:
        return train.run(invocation)
    if command in CORE_COMMANDS:
        return CORE_COMMANDS[command].run(invocation)
    entry = invocation.find_command(command, CORE_COMMANDS)
    ready = invocation.build_command(entry)
    warn(invocation.notices)
    return ready.run()


def _help(command: str | None, invocation: Invocation) -> int:
    """Print the help of training, or of one command."""
    if command in CORE_COMMANDS:
        print(CORE_COMMANDS[command].usage)
    elif command is not None:
        print(command_help(invocation.find_command(command, CORE_COMMANDS)))
    else:
        # Help must help where a plugin is the trouble.
        problems = invocation.enable_plugins()
        print(training_help(Registry(invocation.host), CORE_COMMANDS))
        warn(str(problem) for problem in problems)
    return 0
