"""Conversion takes the memory of its largest tensors, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_peaks_are_bounded_and_do_not_grow_with_the_model(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "benchmarks/convert.py", "--memory", "2", "6"]
    command += ["--disk", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=1200)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 9
    assert [row for row in rows if not row["met"]] == []
