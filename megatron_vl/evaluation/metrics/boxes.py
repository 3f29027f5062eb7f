"""Boxes: intersection over union, on continuous coordinates and in any unit that both boxes share."""

from __future__ import annotations

from typing import TypeAlias

Box: TypeAlias = tuple[float, float, float, float]
"""x1, y1, x2, y2: the top left and the bottom right corner."""


def box_area(box: Box) -> float:
    """Area of a box; 0 where its corners are swapped, which therefore never matches anything."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]; 0 if both are empty."""
    overlap = box_area(
        (
            max(first[0], second[0]),
            max(first[1], second[1]),
            min(first[2], second[2]),
            min(first[3], second[3]),
        )
    )
    union = box_area(first) + box_area(second) - overlap
    return overlap / union if union > 0.0 else 0.0


def box_hit(prediction: Box | None, truth: Box, *, threshold: float = 0.5) -> float:
    """1.0 if the predicted box reaches ``threshold`` IoU (as Qwen-VL's evaluation: >=); no box is a miss."""
    return float(prediction is not None and box_iou(prediction, truth) >= threshold)
