"""The perspective under which a page is seen, for pixels and for quadrilaterals alike.

A homography takes the paper's rectangle to four given corners. Pillow wants its inverse (from the output's
pixel to the input's), the tracked quadrilaterals want it as it is; both come from one matrix, so text and
label cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Point = tuple[float, float]
Quad = tuple[Point, Point, Point, Point]


@dataclass(frozen=True)
class Perspective:
    """A map of the plane; ``matrix``: float64[3, 3], homogeneous coordinates."""

    matrix: npt.NDArray[np.float64]

    def point(self, x: float, y: float) -> Point:
        """Where the point is seen."""
        u, v, w = self.matrix @ (x, y, 1.0)
        return float(u / w), float(v / w)

    def rectangle(self, x: float, y: float, width: float, height: float) -> Quad:
        """Where an upright rectangle is seen: its corners clockwise from top-left."""
        right, bottom = x + width, y + height
        return self.point(x, y), self.point(right, y), self.point(right, bottom), self.point(x, bottom)

    def warp(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """The image as it is seen, on a canvas of ``size``; 0 where it is not."""
        inverse = np.linalg.inv(self.matrix)
        coefficients = (inverse / inverse[2, 2]).ravel()[:8]
        return image.transform(size, Image.Transform.PERSPECTIVE, coefficients.tolist(), Image.Resampling.BILINEAR)


def perspective(width: float, height: float, corners: Quad) -> Perspective:
    """The homography that takes the rectangle of ``width`` x ``height`` to ``corners`` (clockwise)."""
    sources: Quad = ((0, 0), (width, 0), (width, height), (0, height))
    rows, values = [], []
    for (x, y), (u, v) in zip(sources, corners, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    solution = np.linalg.solve(np.array(rows, dtype=np.float64), np.array(values, dtype=np.float64))
    return Perspective(np.append(solution, 1.0).reshape(3, 3))
