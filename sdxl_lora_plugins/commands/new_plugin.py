"""``sdxl-train new-plugin``: a package with a plugin that works, to be changed."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from sdxl_train import Command, Field, UserError, __version__

_KINDS = {
    "model": "models",
    "quantization": "quantizations",
    "network": "networks",
    "optimizer": "optimizers",
    "scheduler": "schedulers",
    "timesteps": "timesteps",
    "noise": "noises",
    "loss": "losses",
    "weighting": "weightings",
    "observer": "observers",
    "command": "commands",
}
"""Kinds of component, and the plural in the name of the hook that registers them."""

_LINE = 100
"""Length of a line in the package."""

PluginKind = Literal[
    "model",
    "quantization",
    "network",
    "optimizer",
    "scheduler",
    "timesteps",
    "noise",
    "loss",
    "weighting",
    "observer",
    "command",
]


def _split(value: object) -> object:
    """Read ``noise,optimizer`` as well as a list."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [word.strip() for item in items for word in str(item).split(",") if word.strip()]


class NewPlugin(Command):
    """Write a package with a plugin of your own: it installs, trains and passes its tests."""

    positional: ClassVar[tuple[str, ...]] = ("name",)

    name: str = Field(description="What `--plugin` shall take: small letters, digits and hyphens.")
    kind: Annotated[list[PluginKind], BeforeValidator(_split)] = Field(
        ["noise"], description="What it provides, as in noise,optimizer."
    )
    dir: Path | None = Field(None, description="Folder to make. Default: sdxl-train-NAME, here.")
    license: str = Field("Apache-2.0", description="Its SPDX identifier.")
    author: str = Field("", description="Your name.")

    def run(self) -> int:
        """Write the package.

        Raises:
            UserError: If the name will not do, the folder is taken, or copier is not installed.
        """
        name = self.name.removeprefix("sdxl-train-")
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(name):
            raise UserError.of(
                "NAME", f"{self.name!r} will not do", "small letters, digits and hyphens: my-noise"
            )
        folder = self.dir or Path(f"sdxl-train-{name}")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError.of("--dir", f"{folder} exists", "name a folder that does not")
        if importlib.util.find_spec("copier") is None:
            raise UserError.of(
                "sdxl-train new-plugin", "needs the package copier", "pip install copier"
            )
        from copier import run_copy

        kinds = [kind for kind in _KINDS if kind in self.kind]
        words = name.split("-")
        package = f"sdxl_train_{'_'.join(words)}"
        prefix = "".join(word.capitalize() for word in words)
        titles = [kind.capitalize() for kind in kinds]
        answers = {
            "name": name,
            "distribution": f"sdxl-train-{name}",
            "package": package,
            "option": "_".join(words),
            "title": " ".join(words).capitalize(),
            "prefix": prefix,
            "kinds": kinds,
            "hooks": _KINDS,
            "imports": _import("sdxl_train", [*sorted(titles), "hookimpl"]),
            "test_imports": _import(
                "sdxl_train.testing", sorted(f"{title}Contract" for title in titles)
            ),
            "license": self.license,
            "author": self.author,
            "api": _api_range(),
        }
        template = Path(__file__).with_name("plugin_template")
        run_copy(str(template), folder, data=answers, defaults=True, overwrite=True, quiet=True)
        print(
            f"{folder}: {', '.join(kinds)}\n\n"
            f'  cd {folder} && pip install -e ".[test]" && pytest\n'
            f"  sdxl-train components --plugin {name}\n\n"
            f"Change what stands in {package}/; README.md says how to publish it."
        )
        return 0


def _import(module: str, names: list[str]) -> str:
    """Write an import as a formatter would."""
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= _LINE:
        return line
    return "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])


def _api_range() -> str:
    """Give the versions that keep the promises of this one: the hooks of its minor version."""
    major, minor = (int(part) for part in __version__.split(".")[:2])
    following = f"{major}.{minor + 1}" if major == 0 else f"{major + 1}"
    return f">={major}.{minor},<{following}"
