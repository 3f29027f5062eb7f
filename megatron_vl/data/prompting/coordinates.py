"""Boxes and quadrilaterals as the text that Qwen-VL reads and writes: integers in [0, 1000) along each axis.

One rule and its inverse, used by prompts, generation and drawing alike. A coordinate x in [0, 1] falls into
cell ``floor(1000 x)`` (1.0 into the last); a cell stands for its center. So text -> coordinates -> text is
exact, and coordinates -> text -> coordinates errs by at most half a cell. The original's rounding was never
published.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

GRID = 1000
_POINT = r"\(\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)"
_POINT_PATTERN = re.compile(_POINT)
_POINTS_PATTERN = re.compile(rf"\s*{_POINT}(?:\s*,\s*{_POINT})*\s*")


def to_cell(value: float) -> int:
    """Cell in [0, 1000) of a coordinate in [0, 1]; values outside are clipped to the image.

    Raises ValueError if the coordinate is not a finite number.
    """
    if 0.0 <= value < 1.0:
        return int(value * GRID)
    if not math.isfinite(value):
        raise ValueError(f"coordinate {value} is not a finite number")
    return 0 if value < 0.0 else GRID - 1


def from_cell(cell: int) -> float:
    """Center of a cell, in [0, 1]."""
    return (cell + 0.5) / GRID


def format_points(coordinates: Sequence[float]) -> str:
    """``(x1,y1),(x2,y2)``... of the flat coordinates x1, y1, x2, y2, ... in [0, 1]."""
    cells = tuple(map(to_cell, coordinates))
    return ",".join(["(%d,%d)"] * (len(cells) // 2)) % cells


def parse_cells(text: str, num_points: int) -> tuple[int, ...] | None:
    """Flat cells of exactly ``num_points`` points, or None if the text is anything else."""
    if not _POINTS_PATTERN.fullmatch(text):
        return None
    points = _POINT_PATTERN.findall(text)
    if len(points) != num_points:
        return None
    return tuple(int(value) for point in points for value in point)


def parse_points(text: str, num_points: int) -> tuple[float, ...] | None:
    """Flat coordinates in [0, 1] of exactly ``num_points`` points, or None if the text is anything else."""
    cells = parse_cells(text, num_points)
    return None if cells is None else tuple(map(from_cell, cells))
