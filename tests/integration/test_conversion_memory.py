"""Conversion takes the memory of its largest tensor, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _measured(tmp_path: Path, *sizes: str) -> list[dict[str, object]]:
    command = [sys.executable, "-W", "ignore", "benchmarks/convert.py", "--memory", *sizes]
    command += ["--disk", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=1200)
    rows: list[dict[str, object]] = json.loads((tmp_path / "rows.json").read_text())
    return rows


@pytest.mark.parametrize(
    "sizes", [("0.5", "1"), pytest.param(("2", "6"), marks=pytest.mark.long)], ids=["1-gb", "6-gb"]
)
def test_peaks_are_bounded_and_do_not_grow_with_the_model(tmp_path: Path, sizes: tuple[str, ...]) -> None:
    rows = _measured(tmp_path, *sizes)
    assert len(rows) == 9
    assert [row for row in rows if not row["met"]] == []
