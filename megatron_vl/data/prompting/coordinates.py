"""Boxes and quadrilaterals as the text that Qwen-VL reads and writes: integers in [0, 1000) along each axis.

Prompts, generation and drawing use one rule and its inverse. A coordinate x in [0, 1] belongs to cell ``floor(1000 x)``
(1.0 to the last cell). A cell represents its center. So text -> coordinates -> text is exact, and coordinates -> text
-> coordinates has an error of at most half a cell. The rounding rule of the original was never published.

The original brings cells to pixels in two ways (:func:`cells_to_pixels`), which differ by up to a pixel in 1,000.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

GRID = 1000
PixelScale = Literal["drawing", "evaluation"]
_POINT = r"\(\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)"
_POINT_PATTERN = re.compile(_POINT)
_POINTS_PATTERN = re.compile(rf"\s*{_POINT}(?:\s*,\s*{_POINT})*\s*")
_CORNERS_PATTERN = re.compile(rf"{_POINT}\s*,\s*{_POINT}")


def to_cell(value: float) -> int:
    """Return the cell in [0, 1000) of a coordinate in [0, 1]. Values outside are clipped to the image.

    Raises:
        ValueError: The coordinate is not a finite number.
    """
    if 0.0 <= value < 1.0:
        return int(value * GRID)
    if not math.isfinite(value):
        raise ValueError(f"coordinate {value} is not a finite number")
    return 0 if value < 0.0 else GRID - 1


def from_cell(cell: int) -> float:
    """Return the center of a cell, in [0, 1]."""
    return (cell + 0.5) / GRID


def to_cells(coordinates: Sequence[float]) -> tuple[int, ...]:
    """Return the cells of flat coordinates in [0, 1]."""
    return tuple(map(to_cell, coordinates))


def cells_to_pixels(cells: Sequence[int], size: tuple[int, int], scale: PixelScale) -> tuple[float, ...]:
    """Return flat cells x1, y1, x2, y2, ... as pixels of an image of ``size`` (width, height).

    ``drawing`` is the rule of the published tokenizer, which draws boxes: a cell is a thousandth of the side, cut to a
    whole pixel, so the far edge is never reached. ``evaluation`` is that of the published evaluation of grounding: cell
    999 is the far edge, and nothing is rounded.
    """
    sides = [size[place % 2] for place in range(len(cells))]
    if scale == "drawing":
        return tuple(cell * side // GRID for cell, side in zip(cells, sides, strict=True))
    return tuple(cell / (GRID - 1) * side for cell, side in zip(cells, sides, strict=True))


def format_points(coordinates: Sequence[float]) -> str:
    """Return ``(x1,y1),(x2,y2)``... for the flat coordinates x1, y1, x2, y2, ... in [0, 1]."""
    cells = to_cells(coordinates)
    return ",".join(["(%d,%d)"] * (len(cells) // 2)) % cells


def parse_points(text: str, num_points: int) -> tuple[float, ...] | None:
    """Return the flat coordinates in [0, 1] of exactly ``num_points`` points, or None for any other text."""
    points = _POINT_PATTERN.findall(text) if _POINTS_PATTERN.fullmatch(text) else []
    return tuple(from_cell(int(value)) for point in points for value in point) if len(points) == num_points else None


def first_cells(text: str) -> tuple[int, int, int, int] | None:
    """Return the first ``(x1,y1),(x2,y2)`` of a text, in tags or not, in cells; None if there is none."""
    found = _CORNERS_PATTERN.search(text)
    if found is None:
        return None
    x1, y1, x2, y2 = map(int, found.groups())
    return x1, y1, x2, y2


def outline(points: tuple[float, ...]) -> tuple[float, ...]:
    """Return the four corners of a box given by two of them; a quad unchanged."""
    if len(points) != 4:
        return points
    x1, y1, x2, y2 = points
    return x1, y1, x2, y1, x2, y2, x1, y2
