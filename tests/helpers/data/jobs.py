"""What the tests of preparation as a job share: shards, a recipe over them, and the command."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.data.prepared import recipe_values

ROOT = Path(__file__).resolve().parents[3]
NUM_TARS = 12
SMALL_SLICES = """
import sys
from megatron_vl.cli import prepare
from megatron_vl.data.prepare import row_plan
row_plan.SLICE_BYTES = 3000
"""
RUN = "if __name__ == '__main__': sys.exit(prepare.main(sys.argv[1:]))"


def hashes(prefix: Path) -> dict[str, str]:
    """SHA-256 of every file of a data set, by suffix."""
    files = prefix.parent.glob(f"{prefix.name}.*")
    return {
        file.name.removeprefix(prefix.name): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


def recipe_file(raw: Path, **changes: Any) -> Path:
    values = recipe_values(**changes)
    values["sources"][1]["records_per_shard"] = 3
    path = raw / "data.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def command(recipe: Path, prefix: Path, *flags: str) -> list[str]:
    return [str(recipe), "--output", str(prefix), "--quiet", "--workers", "1", *flags]


def run_tool(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else ["tools/prepare_data.py"]
    return subprocess.run(
        [sys.executable, *program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
