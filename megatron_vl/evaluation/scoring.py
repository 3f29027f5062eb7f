"""Scores of predictions, task by task.

References and predictions are both texts in the model's markup, so one parser reads both. A task's score is
the ratio of the points it earned to the points it could earn: one a sample, except OCR, where every true word
is one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megatron_vl.evaluation.metrics.answers import exact_match
from megatron_vl.evaluation.metrics.boxes import box_hit, box_iou
from megatron_vl.evaluation.metrics.texts import caption_match
from megatron_vl.evaluation.records import Prediction
from megatron_vl.generation.grounding import first_box, parse_grounding


@dataclass(frozen=True)
class Points:
    """What one prediction earned, and what it could have earned."""

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
    """Exact answer after the VQA benchmark's normalisation."""
    return Points(exact_match(prediction.prediction, prediction.references))


def score_caption(prediction: Prediction) -> Points:
    """Exact caption but for case, spaces and the full stop."""
    return Points(caption_match(prediction.prediction, prediction.references))


def score_referring(prediction: Prediction) -> Points:
    """First box of the prediction against the first of each reference, IoU >= 0.5."""
    boxes = [box for box in map(first_box, prediction.references) if box is not None]
    found = first_box(prediction.prediction)
    return Points(max((box_hit(found, box) for box in boxes), default=0.0))


def score_ocr(prediction: Prediction) -> Points:
    """True words that were read letter for letter, wherever the boxes are."""
    truth = Counter(read_words(prediction.references[0]))
    found = truth & Counter(read_words(prediction.prediction))
    return Points(found.total(), truth.total())


def read_words(text: str) -> list[str]:
    """The words of an OCR text: those inside <ref> tags, or all of a text without tags."""
    parsed = parse_grounding(text)
    return [word for phrase in (parsed.phrases or (parsed.text,)) for word in phrase.split()]


def reference_iou(prediction: Prediction) -> float:
    """IoU of the predicted box with the reference's; 0 where either cannot be read."""
    found, truth = first_box(prediction.prediction), first_box(prediction.references[0])
    return box_iou(found, truth) if found and truth else 0.0


SCORERS: dict[str, tuple[str, Callable[[Prediction], Points]]] = {
    "caption": ("exact caption", score_caption),
    "vqa": ("exact answer", score_vqa),
    "referring": ("box with IoU ≥ 0.5", score_referring),
    "ocr": ("exact words", score_ocr),
}


def score_predictions(predictions: Iterable[Prediction]) -> Mapping[str, Score]:
    """Score each task that has a metric; tasks without one (chat) are left out."""
    earned: dict[str, list[Points]] = defaultdict(list)
    for prediction in predictions:
        if prediction.task in SCORERS:
            earned[prediction.task].append(SCORERS[prediction.task][1](prediction))
    return {task: _total(task, earned[task]) for task in SCORERS if task in earned}


def _total(task: str, points: list[Points]) -> Score:
    possible = sum(item.possible for item in points)
    value = sum(item.earned for item in points) / possible if possible else 0.0
    return Score(task, SCORERS[task][0], value, len(points))
