"""``sdxl-train inspect``: what is in a network file."""

from __future__ import annotations

import warnings
from collections import Counter
from json import dumps
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING, Any, ClassVar

from sdxl_lora_plugins.commands.written import require
from sdxl_lora_plugins.files.opening import open_networks
from sdxl_train import Command, Field, Problem

if TYPE_CHECKING:
    from sdxl_lora_plugins.files import NetworkFile, StoredModule


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

        def run(self) -> int:
            """Read and print."""
            problems: list[Problem] = []
            files = open_networks([self.model], problems)
            require(problems)
            found = describe(files[0])
            print(dumps(found, indent=2) if self.json else "\n".join(_lines(found)))
            return 0


def describe(file: NetworkFile) -> dict[str, Any]:
    """Give what is in a network: an interface, in JSON's types.

    ``hash`` is ``right``, ``wrong`` or ``absent``, of ``sshs_model_hash``.
    """
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
        "warnings": list(file.warnings()),
        "metadata": dict(sorted(file.metadata.items())),
    }


def _norms(file: NetworkFile) -> dict[str, float]:
    from sdxl_lora_plugins.files.deltas import delta

    squares: dict[str, float] = {}
    with file.weights() as read:
        for module in file.modules.values():
            if module.needs_base:
                continue
            found = delta(module, read(module))
            if found is not None:
                block = _block(module)
                squares[block] = squares.get(block, 0.0) + float(found.double().square().sum())
    return {block: square**0.5 for block, square in squares.items()}


def _block(module: StoredModule) -> str:
    """Name a block as kohya does: ``input_blocks.4``, ``middle_block``; of an encoder its part."""
    if module.layer.part != "unet":
        return module.layer.part
    first, second, *_ = module.layer.path.split(".")
    return f"{first}.{second}" if first in ("input_blocks", "output_blocks") else first


def _hash_state(file: NetworkFile) -> str:
    from sdxl_train import hashes_of

    said = file.metadata.get("sshs_model_hash")
    if said is None:
        return "absent"
    return "right" if hashes_of(file.path)["sshs_model_hash"] == said else "wrong"


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [found["file"]]
    for name in ("kinds", "ranks", "modules"):
        counts = ", ".join(f"{key} ({count} layers)" for key, count in found[name].items())
        lines.append(f"{name}: {counts or 'none'}")
    lines.append(f"naming: {' and '.join(found['namings'])}")
    lines.append(f"hash of the weights: {found['hash']}")
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    lines += ["", "norms of deltas by block"]
    lines += [f"  {block:<18} {norm:.4g}" for block, norm in found["norms"].items()]
    lines += ["", "metadata"]
    return lines + [f"  {name}: {text}" for name, text in found["metadata"].items()]
