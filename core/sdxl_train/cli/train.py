"""``sdxl-train FLAGS``: check, plan, run."""

from __future__ import annotations

import gc
import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sdxl_train.cli.console import follow_options, hide_from_process_list, warn
from sdxl_train.errors import UserError
from sdxl_train.options import Words
from sdxl_train.settings import config_path, is_on

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.cli.invocation import Invocation
    from sdxl_train.config import RunConfig
    from sdxl_train.preflight import Prepared

logger = logging.getLogger(__name__)


def run(invocation: Invocation) -> int:
    """Train with the settings of the command line."""
    from sdxl_train.preflight import prepare

    invocation.refuse_leading()
    if is_on(invocation.settings.get("output_config")):
        return _write_config(invocation)
    prepared = prepare(invocation.settings, invocation.host)
    _hide_secrets(prepared.config)
    follow_options(prepared.config)
    warn([*invocation.notices, *prepared.warnings])

    if prepared.config.dataset.debug_dataset:
        return _write_preview(prepared)
    # Only now, when the input is known to be right, is torch worth its import.
    with _without_collecting():
        from sdxl_train.cli.plan import print_plan
        from sdxl_train.planning import make_plan
        from sdxl_train.run import execute

        plan = make_plan(prepared)
    warn([text for text in plan.warnings if text not in prepared.warnings])
    print_plan(plan)
    result = execute(prepared, plan)
    for path in result.files:
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return result.exit_code


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Look for no garbage while libraries are imported: they make millions of objects that stay.

    To look through these over and over takes an eighth of the time to the first step. Afterwards
    they are left out of every search.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _write_preview(prepared: Prepared) -> int:
    """Write the samples of ``--debug_dataset`` and say where they are."""
    from sdxl_train.data.preview import write_preview

    folder = prepared.config.output.output_dir / "debug_dataset"
    try:
        page = write_preview(prepared.batches, folder)
    except OSError as error:
        raise UserError.of(
            str(folder), f"cannot be written: {error.strerror}", "make room, or name another folder"
        ) from None
    print(f"samples written, nothing trained: open {page}")
    return 0


def _hide_secrets(config: RunConfig) -> None:
    """Take secrets off the command line of this process: some trackers record it."""
    secrets = [
        secret
        for name in config.secrets()
        if (setting := config.settings.get(name)) and isinstance(setting.value, Words)
        for secret in setting.value.words
    ]
    for secret in secrets:
        sys.argv[1:] = [
            "***" if word == secret else word.replace(f"={secret}", "=***") for word in sys.argv[1:]
        ]
    hide_from_process_list(secrets)


def _write_config(invocation: Invocation) -> int:
    """Write the options that were given to ``--config_file``."""
    from sdxl_train.settings_file import write_settings

    target = invocation.settings.get("config_file")
    if target is None:
        raise UserError.of(
            "--output_config", "needs a file to write to", "name it with --config_file"
        )
    path = config_path(target)
    write_settings(path, invocation.settings, invocation.host)
    print(f"options written to {path}")
    return 0
