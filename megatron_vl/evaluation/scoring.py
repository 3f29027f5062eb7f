"""Score predictions, task by task.

References and predictions are both texts in the model's markup, so one parser reads both. A task's score is the ratio
of the points it earned to the points it could earn: one a sample, except OCR, where every true word is one. A score is
named after its metric: VQA accuracy is the benchmark's, over the answers of annotators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_vl.data.prompting.coordinates import first_cells
from megatron_vl.data.prompting.grounding import parse_grounding
from megatron_vl.errors import DataError
from megatron_vl.evaluation.metrics.answers import exact_match, vqa_accuracy
from megatron_vl.evaluation.metrics.boxes import box_hit, box_iou
from megatron_vl.evaluation.metrics.texts import caption_match
from megatron_vl.evaluation.questions import Prediction


@dataclass(frozen=True)
class Points:
    """The points that one prediction earned, and those it could have earned."""

    earned: float
    possible: float = 1.0


@dataclass(frozen=True)
class Score:
    """A task's score."""

    task: str
    metric: str
    value: float
    """In [0, 1]."""
    num_samples: int


def score_vqa(prediction: Prediction) -> Points:
    """Score VQA accuracy if several annotators have answered; otherwise the exact answer after VQA's normalization."""
    if prediction.annotators:
        return Points(vqa_accuracy(prediction.prediction, prediction.annotators))
    return Points(exact_match(prediction.prediction, prediction.references))


def score_caption(prediction: Prediction) -> Points:
    """Score the exact caption, ignoring case, spaces and the full stop."""
    return Points(caption_match(prediction.prediction, prediction.references))


def score_referring(prediction: Prediction) -> Points:
    """Compare the first box of the prediction with the first of each reference, IoU >= 0.5.

    Raises:
        DataError: if a reference has no box.
    """
    found, truths = first_cells(prediction.prediction), _true_boxes(prediction)
    if len(truths) < len(prediction.references):
        raise DataError(
            f"prediction {prediction.key}: found no box in its reference {' or '.join(prediction.references)!r:.80}; "
            "expected <box>(x1,y1),(x2,y2)</box> in integers from 0 to 999"
        )
    return Points(max(box_hit(found, truth) for truth in truths))


def score_ocr(prediction: Prediction) -> Points:
    """Count true words that were read exactly, wherever the boxes are; use the reference with the best result."""
    said = Counter(read_words(prediction.prediction))
    truths = [Counter(read_words(reference)) for reference in prediction.references]
    points = [Points((truth & said).total(), truth.total()) for truth in truths]
    return max(points, key=lambda item: item.earned / max(item.possible, 1))


def read_words(text: str) -> list[str]:
    """Return the words of an OCR text: those inside <ref> tags, or all of a text without tags."""
    parsed = parse_grounding(text)
    return [word for phrase in (parsed.phrases or (parsed.text,)) for word in phrase.split()]


def reference_iou(prediction: Prediction) -> Fraction:
    """Return the largest IoU of the predicted box with a reference's; 0 where either cannot be read."""
    found = first_cells(prediction.prediction)
    ious = [box_iou(found, truth) for truth in _true_boxes(prediction)] if found else []
    return max(ious, default=Fraction(0))


def _true_boxes(prediction: Prediction) -> list[tuple[int, int, int, int]]:
    return [box for box in map(first_cells, prediction.references) if box is not None]


SCORERS: dict[str, Callable[[Prediction], Points]] = {
    "caption": score_caption,
    "vqa": score_vqa,
    "referring": score_referring,
    "ocr": score_ocr,
}
METRICS = {
    "caption": "exact caption",
    "vqa": "exact match",
    "referring": "accuracy at IoU ≥ 0.5",
    "ocr": "recall of words",
}
VQA_ACCURACY = "VQA accuracy"


def metric_of(prediction: Prediction) -> str:
    """Return the name of the metric of the prediction's task."""
    return VQA_ACCURACY if prediction.annotators and prediction.task == "vqa" else METRICS[prediction.task]


def score_predictions(predictions: Iterable[Prediction]) -> Mapping[str, Score]:
    """Score each task that has a metric; tasks without one (chat) are left out.

    Raises:
        DataError: if a task's predictions are not all scored by the same metric, or a reference cannot be scored
            against.
    """
    by_task: dict[str, list[Prediction]] = {task: [] for task in SCORERS}
    for prediction in predictions:
        by_task.get(prediction.task, []).append(prediction)
    return {task: _score(task, found) for task, found in by_task.items() if found}


def _score(task: str, predictions: Sequence[Prediction]) -> Score:
    metrics = Counter(map(metric_of, predictions))
    if len(metrics) > 1:
        counts = ", ".join(f"{count} by {metric}" for metric, count in metrics.items())
        raise DataError(
            f"task {task} has no one score: {counts}. Score questions with annotators' answers apart from others"
        )
    points = [SCORERS[task](prediction) for prediction in predictions]
    possible = sum(item.possible for item in points)
    value = sum(item.earned for item in points) / possible if possible else 0.0
    return Score(task, metric_of(predictions[0]), value, len(points))
