"""The benchmarks of packing and balance run in their small form, and meet the goals that no machine decides."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["packing", "balance"])
def test_smoke(name: str, tmp_path: Path) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--smoke", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "next-fit fills 86.8 %" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows and all(set(row) == {"name", "ours", "reference", "ratio", "goal", "met"} for row in rows)
    exact = [row for row in rows if row["goal"] is not None and not row["name"].startswith("seconds")]
    assert len(exact) >= 2
    assert all(row["met"] and row["ratio"] <= row["goal"] for row in exact), exact


def test_the_reference_is_first_fit_decreasing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    stream = importlib.import_module("stream")
    rng = np.random.default_rng(0)
    for size in rng.integers(1, 300, 40).tolist():
        lengths = rng.integers(1, stream.ROW + 1, size)
        used: list[int] = []
        for length in sorted(lengths.tolist(), reverse=True):
            row = next((row for row, tokens in enumerate(used) if tokens + length <= stream.ROW), None)
            if row is None:
                used.append(length)
            else:
                used[row] += length
        assert stream.first_fit_decreasing(lengths) == len(used)
