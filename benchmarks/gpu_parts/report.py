"""What a part reports: rows as they come, so that one that dies or hangs keeps those it has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from measure import Row


@dataclass
class Report:
    """Rows of one part, in a file that is written anew with each."""

    path: Path
    rows: list[Row] = field(default_factory=list)

    def cost(self, name: str, ours: float, reference: float, *, goal: float | None = 1.0) -> None:
        """A figure of which less is better; the goal is a ratio to the reference."""
        ratio = _ratio(ours, reference)
        self._add(Row(name, ours, reference, ratio, goal, None if goal is None else ratio <= goal))

    def rate(self, name: str, ours: float, reference: float, *, goal: float | None = 1.0) -> None:
        """A figure of which more is better; the ratio is turned round, so that here too less is better."""
        ratio = _ratio(reference, ours)
        self._add(Row(name, ours, reference, ratio, goal, None if goal is None else ratio <= goal))

    def share(self, name: str, ours: float, whole: float) -> None:
        """A part of a whole, without a goal."""
        self._add(Row(name, ours, whole, _ratio(ours, whole), None, None))

    def figure(self, name: str, value: float) -> None:
        """A figure that stands beside nothing."""
        self._add(Row(name, value, value, 1.0, None, None))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self.path.write_text(json.dumps([asdict(row) for row in self.rows]), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """The rows that a part has left, if any."""
    try:
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError):  # it ended before its first row, or while it wrote one
        return []


def as_table(rows: Sequence[Row]) -> list[str]:
    """Lines of a table: name, ours, reference, ratio, goal."""
    width = max((len(row.name) for row in rows), default=4)
    lines = [f"{'name':{width}}  {'ours':>12}  {'reference':>12}  {'ratio':>8}  goal"]
    for row in rows:
        verdict = "" if row.goal is None else f"<= {row.goal:g}: {'met' if row.met else 'MISSED'}"
        lines.append(
            f"{row.name:{width}}  {row.ours:12.5g}  {row.reference:12.5g}  {row.ratio:8.3g}  {verdict}".rstrip()
        )
    return lines


def _ratio(above: float, below: float) -> float:
    """Zero over zero is nothing more than nothing."""
    if below == 0.0:
        return 0.0 if above == 0.0 else float("inf")
    return above / below
