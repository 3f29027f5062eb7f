"""Geometry of a page for pixels and quadrilaterals alike: perspective, and paper that is not quite flat.

A homography maps the rectangle of the paper to four given corners. Pillow needs its inverse (from output pixels to
input pixels), and the tracked quadrilaterals need the homography itself. Both come from one matrix, so text and labels
always agree. An elastic field consists of shifts at the nodes of a grid, bilinear in between. This is exactly what
Pillow's mesh does. Its inverse is found by iteration. A curved edge is not a side of a quadrilateral, so a label is the
quadrilateral that encloses the whole outline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Point = tuple[float, float]
Quad = tuple[Point, Point, Point, Point]
Points = npt.NDArray[np.float64]
"""float64[n, 2]: x and y."""

CELL = 48
"""Distance in pixels between the nodes of an elastic field."""
MAX_ELASTIC = CELL / 4
"""Shifts of this many pixels could fold the paper."""


@dataclass(frozen=True)
class Perspective:
    """A map of the plane. ``matrix`` is float64[3, 3], in homogeneous coordinates."""

    matrix: npt.NDArray[np.float64]

    def points(self, points: Points) -> Points:
        """Map points float64[n, 2] of the paper to the image."""
        seen = np.array([self.matrix @ (x, y, 1.0) for x, y in points])
        return np.asarray(seen[:, :2] / seen[:, 2:])

    def warp(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """Map the image to a canvas of ``size``, with 0 outside the paper."""
        inverse = np.linalg.inv(self.matrix)
        coefficients = (inverse / inverse[2, 2]).ravel()[:8]
        return image.transform(size, Image.Transform.PERSPECTIVE, coefficients.tolist(), Image.Resampling.BILINEAR)


def perspective(width: float, height: float, corners: Quad) -> Perspective:
    """Return the homography from the rectangle ``width`` x ``height`` to ``corners`` (clockwise)."""
    sources: Quad = ((0, 0), (width, 0), (width, height), (0, height))
    rows, values = [], []
    for (x, y), (u, v) in zip(sources, corners, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    solution = np.linalg.solve(np.array(rows, dtype=np.float64), np.array(values, dtype=np.float64))
    return Perspective(np.append(solution, 1.0).reshape(3, 3))


@dataclass(frozen=True)
class Elastic:
    """An elastic field: pixel (x, y) of the output shows the input at (x, y) + shift(x, y)."""

    cell: int
    """Distance between the nodes in pixels."""
    shifts: npt.NDArray[np.float64]
    """float64[rows + 1, columns + 1, 2]: shift in x and y at each node."""

    def shift(self, points: Points) -> Points:
        """Return the shifts at points of the output; float64[n, 2] to float64[n, 2]."""
        rows, columns = self.shifts.shape[0] - 1, self.shifts.shape[1] - 1
        x = np.clip(points[:, 0] / self.cell, 0, columns)
        y = np.clip(points[:, 1] / self.cell, 0, rows)
        column, row = np.minimum(x.astype(int), columns - 1), np.minimum(y.astype(int), rows - 1)
        u, v = (x - column)[:, None], (y - row)[:, None]
        top = self.shifts[row, column] * (1 - u) + self.shifts[row, column + 1] * u
        bottom = self.shifts[row + 1, column] * (1 - u) + self.shifts[row + 1, column + 1] * u
        return np.asarray(top * (1 - v) + bottom * v)

    def points(self, points: Points) -> Points:
        """Map points float64[n, 2] of the input to the output."""
        seen = points
        for _ in range(30):  # a contraction: shifts differ by less than the distance of nodes
            seen = points - self.shift(seen)
        return seen

    def warp(self, image: Image.Image) -> Image.Image:
        """Map the image to the output; edges are repeated beyond the image."""
        rows, columns = self.shifts.shape[0] - 1, self.shifts.shape[1] - 1
        y, x = np.mgrid[0 : rows + 1, 0 : columns + 1] * float(self.cell)
        sources = np.stack([x, y], axis=-1) + self.shifts
        margin = self.cell
        padded = _repeat_edges(image, margin)
        mesh = [
            (
                (column * self.cell, row * self.cell, (column + 1) * self.cell, (row + 1) * self.cell),
                (sources[[row, row + 1, row + 1, row], [column, column, column + 1, column + 1]] + margin).ravel(),
            )
            for row in range(rows)
            for column in range(columns)
        ]
        canvas = (columns * self.cell, rows * self.cell)
        plain = [(box, tuple(quad.tolist())) for box, quad in mesh]
        return padded.transform(canvas, Image.Transform.MESH, plain, Image.Resampling.BILINEAR).crop(
            (0, 0, *image.size)
        )


def elastic(size: tuple[int, int], amplitude: float, rng: np.random.Generator) -> Elastic:
    """Return a random field for an image of ``size`` with shifts of at most ``amplitude`` pixels."""
    if not 0 <= amplitude < MAX_ELASTIC:
        raise ValueError(f"an amplitude of {amplitude} folds the paper; expected less than {MAX_ELASTIC}")
    columns, rows = (math.ceil(side / CELL) for side in size)
    angle = rng.uniform(0, 2 * math.pi, (rows + 1, columns + 1))
    length = rng.uniform(0, amplitude, (rows + 1, columns + 1))
    return Elastic(CELL, np.stack([length * np.cos(angle), length * np.sin(angle)], axis=-1))


def outline(x: float, y: float, width: float, height: float, step: float = 8.0) -> list[Points]:
    """Return the sides of an upright rectangle, clockwise from the top-left corner, float64[n, 2] each.

    Neighboring points are about ``step`` pixels apart.
    """
    corners = np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)], dtype=np.float64)
    sides = []
    for start, end in zip(corners[:-1], corners[1:], strict=True):
        count = max(2, math.ceil(float(np.abs(end - start).sum()) / step) + 1)
        sides.append(start + np.linspace(0, 1, count)[:, None] * (end - start))
    return sides


def enclose(sides: Sequence[Points]) -> Quad:
    """Return the quadrilateral with edges along the four sides (clockwise) that has all their points inside."""
    lines = []
    for side in sides:
        along = (side[-1] - side[0]) / np.linalg.norm(side[-1] - side[0])
        outward = np.array([along[1], -along[0]])
        lines.append((outward, float((side @ outward).max())))
    corners = [
        np.linalg.solve(np.array([lines[i - 1][0], lines[i][0]]), np.array([lines[i - 1][1], lines[i][1]]))
        for i in range(4)
    ]
    a, b, c, d = ((float(x), float(y)) for x, y in corners)
    return a, b, c, d


def _repeat_edges(image: Image.Image, margin: int) -> Image.Image:
    pixels = np.asarray(image)
    widths = [(margin, margin), (margin, margin), (0, 0)][: pixels.ndim]
    return Image.fromarray(np.pad(pixels, widths, mode="edge"))
