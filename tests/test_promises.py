"""The tests that ``docs/promises.md`` names exist, and no promise is without one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "promises.md"


def _rows() -> list[tuple[str, str]]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = [row for row in cells if row[0] != "promise" and not row[0].startswith("---")]
    assert rows and all(len(row) == 3 for row in rows)
    return [(promise, tests) for promise, tests, _ in rows]


def _functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("promise", "tests"), _rows(), ids=lambda text: text[:40])
def test_a_promise_has_a_test(promise: str, tests: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", tests)
    assert named, promise
    for file, function in named:
        path = ROOT / file
        assert path.is_file(), f"{promise}: {file}"
        functions = _functions(path)
        assert function in functions if function else any(name.startswith("test_") for name in functions), function


def test_a_promise_is_made_once() -> None:
    promises = [promise for promise, _ in _rows()]
    assert len(promises) == len(set(promises))
