"""Boxes and quadrilaterals of published records as fractions of the image in [0, 1]."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_vl.data.sample import Region, Sample
from megatron_vl.data.sources.base import is_finite
from megatron_vl.errors import SkipSample

Box = tuple[float, float, float, float]

MIN_EXTENT = 1e-6
"""Of the image's side; a narrower box has no area, and rounding could turn it inside out."""


def box_from_corners(corners: Sequence[float], width: float = 1.0, height: float = 1.0) -> Box:
    """(x1, y1, x2, y2) in units of which the image has ``width`` x ``height``, clipped to the image.

    Raises SkipSample('bad_box') if it is not four finite numbers or nothing of it lies inside the image.
    """
    x1, y1, x2, y2 = _numbers(corners, 4, "bad_box")
    _check_size(width, height)
    box = (_clip(x1 / width), _clip(y1 / height), _clip(x2 / width), _clip(y2 / height))
    if min(box[2] - box[0], box[3] - box[1]) < MIN_EXTENT:
        raise SkipSample("bad_box", f"{list(corners)} in an image of {width:g} x {height:g} has no area")
    return box


def box_from_xywh(xywh: Sequence[float], width: float, height: float) -> Box:
    """The same from COCO's (x, y, width, height)."""
    x, y, w, h = _numbers(xywh, 4, "bad_box")
    return box_from_corners((x, y, x + w, y + h), width, height)


def quad_from_points(points: Sequence[Sequence[float]], width: float, height: float) -> tuple[float, ...]:
    """Eight fractions from four points, clipped to the image; raises SkipSample('bad_quad')."""
    _check_size(width, height)
    if not _has_size(points, 4) or not all(_has_size(point, 2) for point in points):
        raise SkipSample("bad_quad", f"expected four points, found {points!r:.80}")
    x1, y1, x2, y2, x3, y3, x4, y4 = _numbers([*itertools.chain.from_iterable(points)], 8, "bad_quad")
    return (
        _clip(x1 / width), _clip(y1 / height), _clip(x2 / width), _clip(y2 / height),
        _clip(x3 / width), _clip(y3 / height), _clip(x4 / width), _clip(y4 / height),
    )  # fmt: skip


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes with an area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def about_region(sample: Sample, region: Region) -> Sample:
    """``sample``, of the task ``referring`` or ``region_caption``, with what it is about."""
    if sample.task == "referring":
        return replace(sample, question=region.text, regions=(region,))
    return replace(sample, text=region.text, regions=(region,))


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
