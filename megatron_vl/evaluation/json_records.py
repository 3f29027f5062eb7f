"""Typed records from JSON files that a tool of this project has written.

A missing or damaged file is a DataError that names it and says which step writes it. Unknown keys are ignored, so that
newer files stay readable.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from megatron_vl.config.records import Builder
from megatron_vl.errors import DataError

T = TypeVar("T")


def make_record(kind: type[T], values: Any, path: Path, where: str) -> T:
    """Make a record of the values that it knows; a missing value is an error that says where."""
    return Builder(DataError, ours=True).build(kind, values, f"{path}, {where}")


def _read_text(path: Path, written_by: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); it is written by {written_by}") from error


def read_json(path: Path, *, written_by: str) -> Any:
    """Read a JSON file; ``written_by`` is the step to name in errors."""
    try:
        return json.loads(_read_text(path, written_by))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error}); it is written by {written_by}, run that again") from None


def read_json_lines(path: Path, *, written_by: str, is_log: bool = False) -> dict[int, Any]:
    """Return the values of JSON lines by their numbers; a torn last line of a log (a killed writer) is left out."""
    lines = _read_text(path, written_by).split("\n")
    records = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records[number] = json.loads(line)
        except json.JSONDecodeError as error:
            if is_log and number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not JSON ({error}); it is written by {written_by}") from None
    return records
