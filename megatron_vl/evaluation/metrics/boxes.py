"""Boxes: intersection over union, on continuous coordinates and in any unit that both boxes share.

It is a fraction, without rounding. With floats, many boxes whose IoU is exactly 1/2 would count as misses. So it is
exact in the cells that the model writes.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TypeAlias

Box: TypeAlias = tuple[float, float, float, float]
"""x1, y1, x2, y2: the top left and the bottom right corner."""

HIT = Fraction(1, 2)
"""The minimum IoU at which a box counts as found (as in Qwen-VL's evaluation: >=)."""


def box_area(box: tuple[Fraction, ...]) -> Fraction:
    """Return the area of a box; 0 where its corners are swapped, which therefore never matches anything."""
    return max(Fraction(0), box[2] - box[0]) * max(Fraction(0), box[3] - box[1])


def box_iou(first: Box, second: Box) -> Fraction:
    """Return the intersection over union of two boxes, in [0, 1]; 0 if both are empty."""
    a, b = tuple(map(Fraction, first)), tuple(map(Fraction, second))
    overlap = box_area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = box_area(a) + box_area(b) - overlap
    return overlap / union if union else Fraction(0)


def box_hit(prediction: Box | None, truth: Box) -> float:
    """Return 1.0 if the predicted box reaches an IoU of ``HIT``; no box is a miss."""
    return float(prediction is not None and box_iou(prediction, truth) >= HIT)
