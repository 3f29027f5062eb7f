"""Boxes and quadrilaterals of published records, converted to fractions of the image in [0, 1].

Published boxes may extend a few pixels beyond the image. They are clipped, corner by corner. A box that extends beyond
an edge by more than the size of the image was measured in other units, and is invalid. A box without area or outside
the image is invalid too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_vl.data.formats.values import is_finite
from megatron_vl.data.sample import Region, Sample
from megatron_vl.errors import SkipSample

Box = tuple[float, float, float, float]
Point = tuple[float, float]

MIN_EXTENT = 1e-6
"""Least extent as a fraction of the image's side. A narrower box has no area, and rounding could invert it."""


def box_from_corners(corners: Sequence[float], width: float = 1.0, height: float = 1.0) -> Box:
    """Return a box from (x1, y1, x2, y2), clipped to the image; ``width`` and ``height`` are those of the image.

    Raises:
        SkipSample: ``bad_box`` unless it is four finite numbers and part of it lies inside the image.
    """
    x1, y1, x2, y2 = _numbers(corners, 4, "bad_box")
    _check_size(width, height)
    fractions = (x1 / width, y1 / height, x2 / width, y2 / height)
    if not _is_near(fractions):
        raise SkipSample("bad_box", f"{list(corners)} is far beyond an image of {width:g} x {height:g}")
    box = (_clip(fractions[0]), _clip(fractions[1]), _clip(fractions[2]), _clip(fractions[3]))
    if max(width, height) > 1 and max(x2 - x1, y2 - y1) <= 1:
        raise SkipSample("bad_box", f"{list(corners)} is not larger than a pixel; is it in fractions?")
    if min(box[2] - box[0], box[3] - box[1]) < MIN_EXTENT:
        raise SkipSample("bad_box", f"{list(corners)} in an image of {width:g} x {height:g} has no area")
    return box


def box_from_xywh(xywh: Sequence[float], width: float, height: float) -> Box:
    """Return a box from COCO's (x, y, width, height), as ``box_from_corners`` does."""
    x, y, w, h = _numbers(xywh, 4, "bad_box")
    return box_from_corners((x, y, x + w, y + h), width, height)


def quad_from_points(points: Sequence[Sequence[float]], width: float, height: float) -> tuple[float, ...]:
    """Return eight fractions from four points in their order around the quad, clipped to the image.

    Raises:
        SkipSample: ``bad_quad`` unless it is four points, part of it lies inside the image, and no sides cross.
    """
    a, b, c, d = corners = _corners(points, width, height)
    if not _is_near((*a, *b, *c, *d)):
        raise SkipSample("bad_quad", f"{points!r:.80} is far beyond an image of {width:g} x {height:g}")
    spans = [max(values) - min(values) for values in zip(a, b, c, d, strict=True)]
    if max(width, height) > 1 and spans[0] * width <= 1 and spans[1] * height <= 1:
        raise SkipSample("bad_quad", f"{points!r:.80} is not larger than a pixel; is it in fractions?")
    if _cross(a, b, c, d) or _cross(b, c, d, a):
        raise SkipSample("bad_quad", f"{points!r:.80}: sides cross; expected the corners in their order around it")
    if not _shows(corners):
        raise SkipSample("bad_quad", f"{points!r:.80} in an image of {width:g} x {height:g} has no area")
    return _clipped(corners)


def clipped_quad(points: Sequence[Sequence[float]], width: float, height: float) -> tuple[float, ...]:
    """Return eight fractions of the image, clipped to it. Raises SkipSample('bad_quad') unless it is four points."""
    return _clipped(_corners(points, width, height))


def shows_in_image(points: Sequence[Sequence[float]], width: float, height: float) -> bool:
    """Return whether part of a quad's area lies inside the image. Raises SkipSample('bad_quad') unless four points."""
    return _shows(_corners(points, width, height))


def overlap(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes with an area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def about_region(sample: Sample, region: Region) -> Sample:
    """Return ``sample``, of the task ``referring`` or ``region_caption``, with the region that it is about."""
    if sample.task == "referring":
        return replace(sample, question=region.text, regions=(region,))
    return replace(sample, text=region.text, regions=(region,))


def _corners(points: Sequence[Sequence[float]], width: float, height: float) -> list[Point]:
    """Return four points as fractions of the image, not clipped."""
    _check_size(width, height)
    if not _has_size(points, 4) or not all(_has_size(point, 2) for point in points):
        raise SkipSample("bad_quad", f"expected four points, found {points!r:.80}")
    numbers = _numbers([*itertools.chain.from_iterable(points)], 8, "bad_quad")
    return [(x / width, y / height) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]


def _shows(corners: list[Point]) -> bool:
    return _area(_inside(corners)) >= MIN_EXTENT**2


def _clipped(corners: list[Point]) -> tuple[float, ...]:
    return tuple(_clip(value) for corner in corners for value in corner)


def _is_near(fractions: Sequence[float]) -> bool:
    return min(fractions) >= -1 and max(fractions) <= 2


def _inside(corners: list[Point]) -> list[Point]:
    """Return the part of the polygon in the unit square, by clipping at each side of the square in turn."""
    if all(0.0 <= x <= 1.0 and 0.0 <= y <= 1.0 for x, y in corners):  # as nearly every published quad
        return corners
    for axis, limit, sign in ((0, 0.0, 1), (0, 1.0, -1), (1, 0.0, 1), (1, 1.0, -1)):
        kept: list[Point] = []
        for before, corner in zip([*corners[-1:], *corners[:-1]], corners, strict=True):
            was_in, is_in = ((point[axis] - limit) * sign >= 0 for point in (before, corner))
            if was_in != is_in:
                share = (limit - before[axis]) / (corner[axis] - before[axis])
                other = before[1 - axis] + share * (corner[1 - axis] - before[1 - axis])
                kept.append((limit, other) if axis == 0 else (other, limit))
            if is_in:
                kept.append(corner)
        corners = kept
    return corners


def _area(corners: list[Point]) -> float:
    pairs = itertools.pairwise([*corners, *corners[:1]])
    return abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in pairs)) / 2


def _cross(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Return whether the segments from a to b and from c to d cross; touching is not crossing."""
    return _side(a, b, c) * _side(a, b, d) < 0 and _side(c, d, a) * _side(c, d, b) < 0


def _side(a: Point, b: Point, point: Point) -> float:
    return (b[0] - a[0]) * (point[1] - a[1]) - (b[1] - a[1]) * (point[0] - a[0])


def _numbers(values: Sequence[float], count: int, reason: str) -> list[float]:
    if not _has_size(values, count) or not all(map(is_finite, values)):
        raise SkipSample(reason, f"expected {count} finite numbers, found {values!r:.80}")
    return list(values)


def _has_size(values: Any, count: int) -> bool:
    return isinstance(values, (list, tuple)) and len(values) == count


def _check_size(width: float, height: float) -> None:
    if not (is_finite(width) and is_finite(height) and width > 0 and height > 0):
        raise SkipSample("bad_size", f"image size {width!r:.40} x {height!r:.40}")


def _clip(value: float) -> float:
    return 0.0 if value <= 0.0 else value if value < 1.0 else 1.0
