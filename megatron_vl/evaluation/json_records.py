"""Typed records from JSON files that a tool of this project has written.

A missing or damaged file is a DataError that names it and says which step writes it. Unknown keys are ignored, so that
newer files stay readable.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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
    return dict(iterate_json_lines(path, written_by=written_by, is_log=is_log))


def iterate_json_lines(path: Path, *, written_by: str, is_log: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield what :func:`read_json_lines` returns, one line at a time."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except json.JSONDecodeError as error:
                        if is_log and not line.endswith("\n"):
                            break
                        said = f"not JSON ({error}); it is written by {written_by}"
                        raise DataError(f"{path}, line {number}: {said}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); it is written by {written_by}") from error
