"""Every check of the kit fails on a component that breaks what it checks, and on that only."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_train import testing
from tests.contracts import mutants

FILE = Path(mutants.__file__)
CONTRACTS = [getattr(testing, name) for name in testing.__all__ if name.endswith("Contract")]
GENERAL = {"Contract", "FunctionContract", "TensorFunctionContract"}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, set[str]]:
    """How each mutant fared in the check that must catch it: ``passed``, ``failed``, ``error``."""
    nodes = [f"{FILE}::{name}::{check}" for name, check in mutants.CAUGHT_BY.items()]
    options = ["-n0", "-q", "-rA", "--tb=line", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *nodes],
        cwd=FILE.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, set[str]] = {}
    for outcome, name in re.findall(
        r"^(PASSED|FAILED|ERROR|SKIPPED) \S+?::(\w+)::", done.stdout, re.MULTILINE
    ):
        found.setdefault(name, set()).add(outcome.lower())
    assert found, done.stdout + done.stderr
    return found


@pytest.mark.parametrize("name", mutants.CAUGHT_BY)
def test_a_broken_component_is_caught(name: str, outcomes: dict[str, set[str]]) -> None:
    assert "failed" in outcomes[name]
    assert "error" not in outcomes[name]


def test_every_check_has_a_mutant() -> None:
    caught = {
        (base.__name__, mutants.CAUGHT_BY[name])
        for name in mutants.CAUGHT_BY
        for base in inspect.getmro(getattr(mutants, name))
        if mutants.CAUGHT_BY[name] in vars(base)
    }
    checks = {
        (base.__name__, check)
        for contract in CONTRACTS
        for base in inspect.getmro(contract)
        for check in vars(base)
        if check.startswith("test_")
    }

    assert checks - caught == set()
    assert {base for base, _ in checks} >= {contract.__name__ for contract in CONTRACTS} | GENERAL
