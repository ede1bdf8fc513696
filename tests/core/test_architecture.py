"""Who may import whom."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import sdxl_train
from sdxl_train import ldm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "sdxl_train"
BUILTIN = ROOT / "sdxl_lora_plugins"
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/*/__init__.py"))
LDM = CORE / "ldm"
PUBLIC = {"sdxl_train": sdxl_train.__all__, "sdxl_train.ldm": ldm.__all__}
HEAVY = {"torch", "diffusers", "transformers", "accelerate"}


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*.py"))
    assert files
    return files


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Give every import as module and imported name; the name is empty for ``import module``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            yield from ((str(node.module), alias.name) for alias in node.names)


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _top(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("path", _files(CORE), ids=lambda path: str(path.relative_to(CORE)))
def test_core_imports_no_plugin(path: Path) -> None:
    plugins = {BUILTIN.name, *(folder.name for folder in PLUGINS)}

    assert not [module for module, _ in _imports(_parsed(path)) if _top(module) in plugins]


def test_plugins_import_public_names_only_and_no_other_plugin() -> None:
    packages = {BUILTIN.name, *(folder.name for folder in PLUGINS)}
    wrong = []
    for folder in (BUILTIN, *PLUGINS):
        for path in _files(folder):
            for module, name in _imports(_parsed(path)):
                if _top(module) == "sdxl_train":
                    is_public = name in PUBLIC.get(module, ())
                elif _top(module) in packages:
                    is_public = _top(module) == folder.name
                else:
                    is_public = True
                if not is_public:
                    wrong.append(f"{path.relative_to(ROOT)}: {module} {name}")

    assert wrong == []


def test_tests_of_plugins_use_the_public_names_and_the_kit_only() -> None:
    wrong = []
    for folder in PLUGINS:
        for path in sorted((folder.parent / "tests").rglob("*.py")):
            for module, name in _imports(_parsed(path)):
                is_public = name in PUBLIC.get(module, ())
                is_kit = module.startswith("sdxl_train.testing")
                if _top(module) == "sdxl_train" and not (is_public or is_kit):
                    wrong.append(f"{path.relative_to(ROOT)}: {module} {name}")

    assert wrong == []


def test_framework_knows_no_latent_diffusion() -> None:
    """``sdxl_train.ldm`` is a library for model families; nothing else in core imports it."""
    framework = [path for path in _files(CORE) if LDM not in path.parents]
    found = [
        f"{path.relative_to(CORE)}: {module}"
        for path in framework
        for module, _ in _imports(_parsed(path))
        if module.startswith("sdxl_train.ldm")
    ]

    assert found == []


@pytest.mark.parametrize("path", _files(CORE), ids=lambda path: str(path.relative_to(CORE)))
def test_core_names_no_model_family(path: Path) -> None:
    text = re.sub(r"sdxl[-_]train|SdxlTrain|sdxl_lora_plugins|sdxl-lora", "", path.read_text())
    # Settings and data sets that carry the name in the ecosystem.
    text = re.sub(r"sdxl_train_network|sdxl_train", "", text)

    assert not re.search(r"sdxl|\bsd1\b|\bsd2\b|bigG|te1\b.*CLIP", text, re.IGNORECASE)


@pytest.mark.parametrize("module", [sdxl_train, ldm])
def test_public_names_exist(module: ModuleType) -> None:
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module.__all__) <= set(dir(module))


def test_no_public_name_is_also_a_module() -> None:
    # Importing the module would put it in the place of the name.
    modules = {path.stem for path in CORE.iterdir()}

    assert modules.isdisjoint(sdxl_train.__all__)


def test_what_help_loads_imports_nothing_heavy() -> None:
    """Walk the imports that run at import time, from the entry points of help."""
    found = []
    todo, seen = ["sdxl_train.cli", BUILTIN.name, *(folder.name for folder in PLUGINS)], set()
    while todo:
        module = todo.pop()
        path = _path_of(module)
        if path is None or path in seen:
            continue
        seen.add(path)
        for imported, name in _imports_at_load(_parsed(path)):
            if _top(imported) in HEAVY:
                found.append(f"{path.relative_to(ROOT)}: {imported}")
            todo += [imported, f"{imported}.{name}"]

    assert len(seen) > 20
    assert found == []


def _path_of(module: str) -> Path | None:
    folders = {"sdxl_train": CORE, BUILTIN.name: BUILTIN, **{p.name: p for p in PLUGINS}}
    top, *rest = module.split(".")
    if top not in folders:
        return None
    path = folders[top].joinpath(*rest)
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _imports_at_load(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Give the imports outside of functions and of ``if TYPE_CHECKING``."""
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from _imports(node)
        else:
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
