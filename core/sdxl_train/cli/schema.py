"""``sdxl-train schema``: let editors complete and check the files of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_train.cli.console import warn
from sdxl_train.cli.invocation import CoreCommand
from sdxl_train.errors import UserError
from sdxl_train.files import replace_file
from sdxl_train.settings import texts_of

if TYPE_CHECKING:
    from sdxl_train.cli.invocation import Invocation
    from sdxl_train.registry import Registry

_SUMMARY = "JSON schemas of a file of options and of a dataset file, for editors."
_USAGE = f"""\
usage: sdxl-train schema [--write [FOLDER]] [--plugin NAME]

{_SUMMARY}
They hold the options of every installed plugin.

  --write [FOLDER]   write them to FOLDER (default: here) as run.schema.json and
                     dataset.schema.json, with a .taplo.toml that binds *run*.toml, *config*.toml
                     and *dataset*.toml in it to them: read by taplo and by editors that use it
                     (Even Better TOML in VS Code, Helix, Zed, Neovim)
  --plugin NAME      a plugin in a file, or no:NAME to leave one out"""

_RUN, _DATASET = "run.schema.json", "dataset.schema.json"
_BINDING = ".taplo.toml"
_RULES = f"""\
# Written by `sdxl-train schema --write`: which schema checks which file.
[[rule]]
include = ["**/*dataset*.toml"]
[rule.schema]
path = "./{_DATASET}"

[[rule]]
include = ["**/*run*.toml", "**/*config*.toml"]
exclude = ["**/*dataset*.toml"]
[rule.schema]
path = "./{_RUN}"
"""


def run(invocation: Invocation) -> int:
    """Print the schemas, or write them to where editors look."""
    target = invocation.settings.pop("write", None)
    invocation.refuse_leading()
    invocation.refuse_flags("schema", ["write"])
    registry = invocation.registry()
    warn(invocation.notices)
    found = documents(registry)
    if target is None:
        print(json.dumps(found, indent=2))
        return 0
    texts = texts_of(target) or ["."]
    folder = Path(texts[0]).expanduser()
    if len(texts) > 1 or not folder.is_dir():
        raise UserError.of("--write", f"'{' '.join(texts)}' is no folder", "name one that exists")
    for name, document in found.items():
        _write(folder / name, json.dumps(document, indent=2) + "\n")
    binding = folder / _BINDING
    if not binding.exists():
        _write(binding, _RULES)
    elif binding.read_text(encoding="utf-8") != _RULES:
        warn([f"{binding} is yours and stays as it is; add to it:\n{_RULES}"])
    return 0


def documents(registry: Registry) -> dict[str, Any]:
    """Give the schemas by the names of their files."""
    from sdxl_train.schemas import dataset_schema, run_schema

    return {_RUN: run_schema(registry), _DATASET: dataset_schema()}


def _write(path: Path, text: str) -> None:
    replace_file(path, text.encode())
    print(path)


COMMAND = CoreCommand(run=run, summary=_SUMMARY, usage=_USAGE)
