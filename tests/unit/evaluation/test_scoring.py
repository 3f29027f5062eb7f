"""Scores of predictions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vl.errors import DataError
from megatron_vl.evaluation.questions import Prediction
from megatron_vl.evaluation.scoring import reference_iou, score_predictions


def _prediction(task: str, prediction: str, *references: str) -> Prediction:
    return Prediction(key="k", task=task, prompt="", references=references, prediction=prediction)


def test_scores_by_task() -> None:
    scores = score_predictions(
        [
            _prediction("vqa", "Red.", "red"),
            _prediction("vqa", "blue", "red", "crimson"),
            _prediction("caption", "A red ball.", "a red ball"),
            _prediction("referring", "<box>(0,0),(500,500)</box>", "<box>(0,0),(500,490)</box>"),
            _prediction("referring", "I see none", "<box>(0,0),(500,490)</box>"),
            _prediction("chat", "hello", "hi"),
        ]
    )
    assert {task: score.value for task, score in scores.items()} == {
        "vqa": 0.5,
        "caption": 1.0,
        "referring": 0.5,
    }
    assert scores["vqa"].num_samples == 2


def _annotated(prediction: str, *annotators: str) -> Prediction:
    return replace(_prediction("vqa", prediction, annotators[0]), annotators=annotators)


def test_answers_of_several_annotators_are_scored_by_vqa_accuracy() -> None:
    said = ("red",) * 2 + ("crimson",) * 8
    score = score_predictions(
        [_annotated("red", *said), _annotated("Crimson.", *said), _annotated("blue", *said), _annotated("x", "x", "x")]
    )["vqa"]
    assert score.metric == "VQA accuracy"
    assert score.value == pytest.approx((0.6 + 1.0 + 0.0 + 1 / 3) / 4)
    assert score_predictions([_prediction("vqa", "red", "red")])["vqa"].metric == "exact match"


def test_one_score_has_one_metric() -> None:
    with pytest.raises(DataError, match="1 by VQA accuracy, 2 by exact match"):
        score_predictions([_annotated("a", "a", "b"), *[_prediction("vqa", "a", "a")] * 2])


def test_ocr_counts_words_over_all_pages_and_ignores_where_they_are() -> None:
    quad = "<quad>(0,0),(9,0),(9,9),(0,9)</quad>"
    truth = f"<ref>oak elm</ref>{quad}<ref>ash</ref>{quad}"
    scores = score_predictions(
        [
            _prediction("ocr", "<ref>elm</ref><quad>(1,1)", truth),
            _prediction("ocr", "fir", "<ref>fir</ref><quad>(0,0),(9,0),(9,9),(0,9)</quad>"),
        ]
    )
    assert scores["ocr"].value == pytest.approx(2 / 4)


def test_of_several_true_readings_the_best_counts() -> None:
    page = _prediction("ocr", "<ref>oak elm</ref>", "<ref>ash</ref>", "<ref>oak elm fir</ref>", "oak beech")
    assert score_predictions([page])["ocr"].value == pytest.approx(2 / 3)
    assert score_predictions([page, _prediction("ocr", "", "oak", "elm fir")])["ocr"].value == pytest.approx(2 / 4)


def test_an_iou_of_one_half_is_a_hit_for_every_box_of_cells() -> None:
    """A float of these cells called 42 % of such boxes a miss."""
    boxes = [(x, y, x + 2 * w, y + h) for x in range(0, 400, 37) for y in (0, 13, 500) for w, h in ((7, 9), (149, 300))]
    texts = [(f"({x1},{y1}),({(x1 + x2) // 2},{y2})", f"({x1},{y1}),({x2},{y2})") for x1, y1, x2, y2 in boxes]
    predictions = [_prediction("referring", f"<box>{half}</box>", f"<box>{box}</box>") for half, box in texts]
    assert score_predictions(predictions)["referring"].value == 1.0


@pytest.mark.parametrize("reference", ["[0.1, 0.2, 0.3, 0.4]", "(1000,0),(1,1)", "the ball", ""])
def test_a_reference_without_a_box_is_no_miss_but_an_error(reference: str) -> None:
    for references in ((reference,), ("<box>(0,0),(9,9)</box>", reference)):
        with pytest.raises(DataError, match="prediction k: found no box in its reference"):
            score_predictions([_prediction("referring", "<box>(0,0),(9,9)</box>", *references)])


def test_reference_iou_is_zero_without_a_box() -> None:
    assert reference_iou(_prediction("referring", "", "<box>(0,0),(9,9)</box>")) == 0.0
    assert reference_iou(_prediction("referring", "(0,0),(9,9)", "<box>(0,0),(9,9)</box>")) == 1.0
