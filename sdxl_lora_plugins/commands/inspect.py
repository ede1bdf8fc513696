"""``sdxl-train inspect``: what is in a network file."""

from __future__ import annotations

import warnings
from collections import Counter
from json import dumps
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING, Any, ClassVar

from sdxl_lora_plugins.commands.written import number, progress, require
from sdxl_lora_plugins.model import SDXL
from sdxl_train import Command, Field, Problem
from sdxl_train.ldm import open_networks, value_problems

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train.ldm import NetworkFile


with warnings.catch_warnings():
    # pydantic has a deprecated method of the name that this flag has in every command.
    warnings.simplefilter("ignore", UserWarning)

    class Inspect(Command):
        """Say what a network file holds: kinds, ranks, norms by block, metadata, its hash.

        The norm of a block is the Frobenius norm of all its deltas together; deltas that depend on
        the base model's weights have none here.
        """

        positional: ClassVar[tuple[str, ...]] = ("model",)

        model: Path = Field(description="The network.")
        json: bool = Field(  # type: ignore[assignment]
            False, description="Print one JSON object."
        )
        config: Path | None = Field(
            None,
            description="Write the settings of the run that made it to this TOML file, for "
            "--config_file.",
        )

        def run(self) -> int:
            """Read and print."""
            problems: list[Problem] = []
            files = open_networks([self.model], SDXL, problems)
            if self.config is not None:
                problems += _config_problems(self.config)
            require(problems)
            if self.config is not None:
                _write_config(self.config, files[0])
                return 0
            found = describe(files[0])
            print(dumps(found, indent=2) if self.json else "\n".join(_lines(found)))
            return 0


def _config_problems(path: Path) -> Iterator[Problem]:
    if path.exists():
        yield Problem(
            place="--config", message=f"{path} is there already", remedy="name another file"
        )
    elif path.suffix != ".toml":
        yield Problem(place="--config", message=f"{path} is no .toml file")
    elif not path.parent.is_dir():
        yield Problem(place="--config", message=f"there is no folder {path.parent}")


def settings_text(file: NetworkFile) -> str:
    """Give the settings of the run that made a network, as a file for ``--config_file``."""
    import tomli_w

    from sdxl_train import recorded_settings

    settings, refused = recorded_settings(file.metadata)
    model = file.metadata.get("ss_sd_model_name", "an unknown model")
    lines = [f"# {file.path.name} was trained on {model}.".replace("\n", " ")]
    lines.append("# To be given beside: --pretrained_model_name_or_path, the data, --output_dir.")
    for name, reason in refused.items():
        lines.append(f"# left out: {name}, which {reason}".replace("\n", " "))
    return "\n".join([*lines, tomli_w.dumps(settings)])


def _write_config(path: Path, file: NetworkFile) -> None:
    path.write_text(settings_text(file), encoding="utf-8")
    print(f"wrote {path}")


def describe(file: NetworkFile) -> dict[str, Any]:
    """Give what is in a network: an interface, in JSON's types.

    ``hash`` is ``right``, ``wrong`` or ``absent``, of ``sshs_model_hash``.
    """
    from sdxl_train import recorded_settings

    modules = file.modules.values()
    return {
        "file": str(file.path),
        "namings": list(file.namings),
        "kinds": dict(Counter(module.title for module in modules)),
        "ranks": {
            str(rank): count
            for rank, count in sorted(Counter(m.rank for m in modules if m.rank).items())
        },
        "modules": dict(Counter(module.layer.part for module in modules)),
        "norms": _norms(file),
        "hash": _hash_state(file),
        "warnings": [
            *file.warnings(),
            *(f"{problem.message}" for problem in value_problems(file)),
        ],
        "settings": recorded_settings(file.metadata)[0],
        "metadata": dict(sorted(file.metadata.items())),
    }


def _norms(file: NetworkFile) -> dict[str, float]:
    from math import isfinite

    import torch

    from sdxl_train.ldm import square_norm

    squares: dict[str, float] = {}
    modules = [module for module in file.modules.values() if not module.needs_base]
    with file.weights() as read:
        for module in progress(modules, total=len(modules), title="norms"):
            square = square_norm(module, read(module), torch.float64)
            if square is not None and isfinite(square):
                squares[module.block] = squares.get(module.block, 0.0) + float(square)
    return {block: square**0.5 for block, square in squares.items()}


def _hash_state(file: NetworkFile) -> str:
    from sdxl_train import hashes_of

    said = file.metadata.get("sshs_model_hash")
    if said is None:
        return "absent"
    return "right" if hashes_of(file.path)["sshs_model_hash"] == said else "wrong"


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [found["file"]]
    for name in ("kinds", "ranks", "modules"):
        counts = ", ".join(f"{key} ({number(n, 'layer')})" for key, n in found[name].items())
        lines.append(f"{name}: {counts or 'none'}")
    lines.append(f"naming: {' and '.join(found['namings'])}")
    lines.append(f"hash of the weights: {found['hash']}")
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    lines += ["", "norms of deltas by block"]
    lines += [f"  {block:<18} {norm:.4g}" for block, norm in found["norms"].items()]
    if not found["norms"]:
        lines.append("  none: every delta depends on the base model's weights")
    lines += ["", "settings of the run that made it (--config FILE writes them)"]
    lines += [f"  {name} = {value}" for name, value in found["settings"].items()]
    lines += ["", "metadata"]
    return lines + [f"  {name}: {text}" for name, text in found["metadata"].items()]
