"""docs/bad-inputs.md is complete: every entry of the catalogue, each with tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "bad-inputs.md"
NUM_ENTRIES = 122
ROW = re.compile(r"\| (\d+) \| (.+?) \| (.+?) \|(?: (.*?))? \|")


@cache
def functions_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def rows() -> list[tuple[str, ...]]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [match.groups("") for line in lines if (match := ROW.fullmatch(line))]


def test_every_entry_of_the_catalogue_stands_there_once() -> None:
    assert [int(number) for number, *_ in rows()] == list(range(1, NUM_ENTRIES + 1))


def test_every_entry_names_tests_that_exist_or_why_there_is_none() -> None:
    without = []
    for number, _, reaction, tests in rows():
        named = re.findall(r"`([\w/.]+\.py)::(test_\w+)`", tests)
        for path, name in named:
            assert name in functions_in(path), f"{number}: {path} has no {name}"
        if not named:
            assert reaction.startswith("none: "), f"{number} names no test"
            without.append(number)
    assert len(without) <= 3, "entries that apply need a test"


def test_a_number_in_the_name_of_a_test_leads_to_its_row() -> None:
    tests = {number: text for number, *_, text in rows()}
    for path in sorted((ROOT / "tests").rglob("test_bad_inputs_*.py")):
        for name in functions_in(str(path.relative_to(ROOT))):
            for number in re.findall(r"_(\d+)(?=_|$)", name):
                if name.startswith("test_"):
                    assert name in tests[number], f"{name} is not among the tests of {number}"
